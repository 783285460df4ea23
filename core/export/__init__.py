"""Variants for other programs: GGUF for llama.cpp and Ollama, mergekit recipes, the Hub."""
