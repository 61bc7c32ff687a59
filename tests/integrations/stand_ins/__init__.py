"""Small trainers of our own with the names, signatures, shapes, dtypes and conventions of the real ones.

What they compute is written from the papers, in float32 with PyTorch's own operators, as the real ones do.
`make test-peers` runs the same tests against the real ones.
"""
