"""`axolotl spin export`: an iteration's pairs as a dataset for others."""
