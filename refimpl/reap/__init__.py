"""REAP: which experts a mixture can lose. Score them, select, prune, audit; and tell when text loops."""
