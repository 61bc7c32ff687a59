"""What an op promises whoever computes it: which arguments it takes, what it returns, the steps of a sampler."""
