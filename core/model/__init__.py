"""A model in memory: loading it, its precision, its memory, and its row of blocks."""
