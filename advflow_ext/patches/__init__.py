"""Patches for other people's models. Nothing is imported or changed before a function here is called."""
