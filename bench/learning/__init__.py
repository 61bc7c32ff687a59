"""How methods learn: `python -m bench.learning`."""
