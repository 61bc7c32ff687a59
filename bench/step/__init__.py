"""One step of reinforcement learning, measured: `python -m bench.step`."""
