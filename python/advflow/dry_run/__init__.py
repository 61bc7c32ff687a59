"""`advflow train --dry_run`: all that can be known of a run before it starts, without weights and without a trace."""
