"""Qwen 2 and 2.5: a Llama block with biases on queries, keys and values, halves of a head rotated."""

from tcinfer.architectures.llama import block

__all__ = ["NORM", "OURS", "ROTARY", "block"]

NORM, ROTARY, OURS = "rms", "half", False
