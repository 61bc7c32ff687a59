"""What adapts while a run goes on."""
