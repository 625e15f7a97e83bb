"""The opponent's answers."""
