"""Scenes of coloured shapes for models that draw photographs: prompts, and a rule that reads what was drawn."""
