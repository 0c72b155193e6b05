"""Bundled models: GGUF files with their cards, and the trainer that made them (`trainer/`, needs torch)."""
