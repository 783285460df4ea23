"""The best sets of blocks to remove, not the best single blocks."""
