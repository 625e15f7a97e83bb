"""The self-play loop."""
