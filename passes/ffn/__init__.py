"""Passes that compute only some neurons of the feed-forward networks."""
