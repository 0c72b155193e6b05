"""Qwen 2 and 2.5: a Llama block with biases on queries, keys and values, halves of a head rotated."""

from tcinfer.architectures.llama import NAMES, block, from_hugging_face

__all__ = ["HUGGING_FACE", "NAMES", "NORM", "OURS", "ROTARY", "block", "from_hugging_face"]

NORM, ROTARY, OURS = "rms", "half", False
HUGGING_FACE = ("qwen2",)
