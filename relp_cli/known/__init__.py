"""Models whose circuit is known: programs compiled into weights, models trained to have one, and what others made."""
