"""What a run leaves behind and shows: its directory and metrics, its figures, its live line."""
