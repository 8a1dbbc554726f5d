"""The codegen of graphopt; import it as ``graphopt.codegen``."""

# The folder is also reachable as a top-level ``codegen`` from the repository root; a
# second import under that name would register everything twice.
if __name__ != "graphopt.codegen":
    raise ImportError(f"import graphopt.codegen, not {__name__}")
