"""From pairs to a loss."""
