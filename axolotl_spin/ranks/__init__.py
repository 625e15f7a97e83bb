"""What several processes have to do with each other: rank 0 does it, all learn; failures; one bar; whole weights."""
