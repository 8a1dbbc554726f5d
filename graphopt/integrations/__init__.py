"""graphopt.integrations."""
