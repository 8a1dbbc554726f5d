"""Passes about which parameters the layers read."""
