"""Training text that a model writes itself: its own answers to the prompts of a dataset."""
