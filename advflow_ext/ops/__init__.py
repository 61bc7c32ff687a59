"""Public operations; each file states its formula, shapes and errors."""
