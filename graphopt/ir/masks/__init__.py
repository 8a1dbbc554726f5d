"""Masks: the graph that builds one, read back as a predicate."""
