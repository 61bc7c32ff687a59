"""What is measured op by op: losses, kernels, the ops of a block; and in which order."""
