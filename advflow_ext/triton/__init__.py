"""Triton kernels of the SD3 blocks: launchers over raw tensors. Nothing here is imported before a kernel is needed."""
