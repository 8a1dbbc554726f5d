"""``python -m graphopt`` is the ``graphopt`` command."""

from graphopt.cli import main

if __name__ == "__main__":
    main()
