"""Model families: what the loop has to know of each, a file for each."""
