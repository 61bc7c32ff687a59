"""A run: rounds, evaluations, its folder, stopping and going on."""
