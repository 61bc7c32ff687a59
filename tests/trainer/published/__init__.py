"""What the published autoregressive models call their weights and compute from them, recorded by running them."""
