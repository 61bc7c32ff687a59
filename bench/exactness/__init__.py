"""What is right, and how exactly: `python -m bench.exactness`."""
