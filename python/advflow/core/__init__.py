"""Random numbers and memory."""
