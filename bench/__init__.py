"""What takes a model, a trainer or its runs to measure; the ops alone: ``python -m advflow_ext.bench``."""

import os

# Before torch loads its OpenMP: waiting threads that spin lose a time slice in each parallel region as soon as anything
# else wants the core (seen: 3 ms of eager PyTorch became 150 ms), which would flatter whoever has fewest regions.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
