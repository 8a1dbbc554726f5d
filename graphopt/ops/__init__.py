"""graphopt.ops."""
