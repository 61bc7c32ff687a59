"""Random numbers, memory, progress."""
