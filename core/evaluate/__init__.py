"""Standard evaluation: perplexity under named protocols, zero-shot tasks, and comparisons."""
