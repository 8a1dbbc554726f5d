"""The serving engine: continuous batching of requests over paged keys and values."""
