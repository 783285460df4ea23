"""What every version of every block costs: KL from the dense model, time and memory."""
