"""Files that appear whole, the paths of a run, and the lock that keeps a second one out."""
