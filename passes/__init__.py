"""The passes of graphopt, one family a folder; import it as ``graphopt.passes``."""

# The folder is also reachable as a top-level ``passes`` from the repository root; a
# second import under that name would register everything twice.
if __name__ != "graphopt.passes":
    raise ImportError(f"import graphopt.passes, not {__name__}")
