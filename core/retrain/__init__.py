"""Retraining pruned checkpoints: LoRA, continued pretraining, full fine-tuning, and recovery."""
