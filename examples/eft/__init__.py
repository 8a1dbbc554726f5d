"""Up-scaling in small: a large base, a small model tuned to a task, and their sum."""
