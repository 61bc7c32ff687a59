"""A thin training loop for rectified-flow image models on top of advflow_ext."""
