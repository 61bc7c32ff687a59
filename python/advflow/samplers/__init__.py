"""Drawing images by the ODE, and the steps of the reverse process."""
