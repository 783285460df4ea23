"""Width pruning: attention heads and MLP neurons, as baselines for depth pruning."""
