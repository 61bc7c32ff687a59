"""Several policies on one base model: who is in force, who follows whom."""
