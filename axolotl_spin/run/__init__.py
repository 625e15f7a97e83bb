"""What a run is, and where it starts."""
