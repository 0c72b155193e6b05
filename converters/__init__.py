"""Converters: one file a checkpoint family, each turning it into a GGUF file."""
