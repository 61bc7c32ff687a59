"""Whether everything works here, and what to do where it does not: ``advflow-doctor``."""
