"""The account of bytes: `python -m bench.roofline`."""
