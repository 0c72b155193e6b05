"""Qwen 2 and 2.5: a Llama block with biases on queries, keys and values, halves of a head rotated."""

from tcinfer.architectures import llama

NORM, ROTARY, OURS = "rms", "half", False
HUGGING_FACE = ("qwen2",)
NAMES, block, from_hugging_face = llama.NAMES, llama.block, llama.from_hugging_face
