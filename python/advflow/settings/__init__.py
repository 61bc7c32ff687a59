"""What a run may be told: sections, the command line, files. Needs no torch."""
