"""A model in memory: loading it, its precision, its memory, and its sequence of blocks."""
