"""One line in a trainer people already run: ``from advflow_ext.integrations import flow_grpo; flow_grpo.install()``.

A module here is one trainer's. ``install()`` replaces its functions by name, under its own signatures and conventions,
``uninstall()`` puts back what was there. No trainer is imported before ``install()``.
"""

# The modules with an install(), one a trainer.
TRAINERS = ("dance_grpo", "flow_factory", "flow_grpo", "mix_grpo", "unirl", "verl_omni")
