"""What `axolotl spin ...` does."""
