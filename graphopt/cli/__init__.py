"""graphopt.cli."""
