"""A Llama block in this project's own files: halves of a head rotated, and any memory."""

from tcinfer.architectures.llama import block

__all__ = ["NORM", "OURS", "ROTARY", "block"]

NORM, ROTARY, OURS = "rms", "half", True
