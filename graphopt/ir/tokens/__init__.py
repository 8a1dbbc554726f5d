"""The rest of a graph on fewer tokens, after a pass gathered some."""
