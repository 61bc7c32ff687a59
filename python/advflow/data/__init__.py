"""Prompts, embedded and in files."""
