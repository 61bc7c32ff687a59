"""Speed and memory of the ops against what PyTorch offers and the trainers write: ``python -m advflow_ext.bench``."""
