"""Drawing images by the ODE."""
