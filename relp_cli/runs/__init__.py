"""What a run directory is: what was asked, its scores, and what is read of both again."""
