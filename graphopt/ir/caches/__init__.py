"""The key-value cache: what each attention reads from it and writes to it."""
