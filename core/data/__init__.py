"""Text to calibrate on, to evaluate on and to retrain on."""
