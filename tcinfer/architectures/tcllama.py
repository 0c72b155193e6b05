"""A Llama block in this project's own files: halves of a head rotated, and any memory."""

from tcinfer.architectures import llama

NORM, ROTARY, OURS = "rms", "half", True
block = llama.block
