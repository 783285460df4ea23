"""Block importance: scores that rank transformer blocks for removal."""
