"""Raw ops, native and Triton, without arguments of an algorithm: their shapes for tracing, and typed entries."""
