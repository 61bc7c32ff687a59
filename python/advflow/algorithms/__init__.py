"""Policy-improvement methods: each turns a batch of the forward process into a loss."""
