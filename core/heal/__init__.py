"""Healing what a cut left: closed-form repairs, and the prune command that can apply them."""
