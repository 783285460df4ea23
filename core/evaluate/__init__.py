"""Standard evaluation: perplexity by named protocols, zero-shot tasks, and what comparing takes."""
