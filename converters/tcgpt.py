"""The published trainer's `ckpt.pt`: a GPT block with Tensor Cache, Infini, window or full.

Source: docs/mechanisms.md, "Published checkpoints".

This project's trainer writes the same, also with a Llama-style block.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from tcinfer.config import ModelConfig, check_choice, check_count, check_number
from tcinfer.converters import source, trainer_args
from tcinfer.converters.pickles import StoredTensor, load_torch
from tcinfer.converters.source import Names, Source, Tensor, shown, typed
from tcinfer.errors import FileError

FLOATS = ("float32", "float16", "bfloat16", "float64")
COMPILED = "_orig_mod."  # torch.compile puts it before every name
# The block's model_args, with the trainer's defaults.
BLOCK_ARGS = {
    "vocab_size": 50304,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "bias": False,
    "use_rope": True,
    "rope_base": 10000.0,
    "rope_scaling_factor": 1.0,
    # of this project's trainer (models/trainer/options.py)
    "block": "gpt",
    "n_kv_head": 0,
    "n_inner": 0,
}
ARCHITECTURE = {"gpt": "tcgpt", "llama": "tcllama"}  # by model_args' block


def recognises(path: Path) -> bool:
    return path.is_file() and path.suffix in (".pt", ".pth")


def read(path: Path) -> Source:
    """Raises FileError for anything that is not such a checkpoint, or holds what this version does not know."""
    contents = load_torch(path)
    if not isinstance(contents, Mapping) or not {"model", "model_args"} <= set(contents):
        raise FileError("no 'model' and 'model_args' inside: this is not a checkpoint of the published trainer")
    args, weights = contents["model_args"], contents["model"]
    if not isinstance(args, Mapping) or not isinstance(weights, Mapping):
        raise FileError("'model' and 'model_args' must be dictionaries")
    source.refuse_unknown(
        args,
        {*BLOCK_ARGS, *trainer_args.defaults(), *trainer_args.TRAINING},
        "model_args",
    )
    config = _config(args, source.name_of(path.resolve().parent))
    have: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise FileError(f"entry {shown(name)} of 'model' is not a tensor")
        if value.dtype not in FLOATS:
            raise FileError(f"tensor {name!r} is {value.dtype}, and weights are floats")
        plain = name.removeprefix(COMPILED)
        if plain in have:
            raise FileError(f"tensor {plain!r} is there twice, once as {COMPILED + plain}")
        have[plain] = Tensor(name, value.shape, value.numpy)
    names = _rename(config, have, args)
    notes = []
    if ignored := sorted(set(args) & trainer_args.TRAINING):
        notes.append(f"arguments for training only: {', '.join(ignored)}")
    if names.idle:
        notes.append(f"tensors of layers without a memory: {', '.join(names.idle)}")
    return Source(config, names.out, path.parent, notes)


def _config(args: Mapping[str, Any], name: str) -> ModelConfig:
    a = {arg: typed(args, arg, default) for arg, default in BLOCK_ARGS.items()}
    check_number("rope_scaling_factor", a["rope_scaling_factor"], 0)
    check_count("n_head", a["n_head"], 1)
    check_count("n_embd", a["n_embd"], 1)
    check_choice("block", a["block"], tuple(ARCHITECTURE))
    check_count("n_kv_head", a["n_kv_head"], 0)
    check_count("n_inner", a["n_inner"], 0)
    if a["n_embd"] % a["n_head"]:
        raise FileError(f"n_embd {a['n_embd']} is not a multiple of n_head {a['n_head']}")
    scaled = a["rope_scaling_factor"] > 1
    return ModelConfig(
        arch=ARCHITECTURE[a["block"]],
        name=name,
        vocab_size=a["vocab_size"],
        n_layers=a["n_layer"],
        d_model=a["n_embd"],
        n_heads=a["n_head"],
        n_kv_heads=a["n_kv_head"] or a["n_head"],
        head_dim=a["n_embd"] // a["n_head"],
        d_ff=a["n_inner"] or 4 * a["n_embd"],
        context_length=a["block_size"],
        rope_dim=-1 if a["use_rope"] else 0,
        rope_base=a["rope_base"],
        rope_scaling="ntk" if scaled else "none",
        rope_factor=a["rope_scaling_factor"] if scaled else 1.0,
        **trainer_args.memory_fields(args, a["n_layer"]),
    )


def _rename(config: ModelConfig, have: dict[str, Tensor], args: Mapping[str, Any]) -> Names:
    names, C = Names(have, typed(args, "bias", BLOCK_ARGS["bias"])), config.d_model
    names.out["token_embd.weight"] = names.take("transformer.wte.weight")
    names.move("transformer.ln_f", "output_norm")
    if config.learned_positions:
        names.out["position_embd.weight"] = names.take("transformer.wpe.weight")
    names.head("lm_head.weight", names.out["token_embd.weight"])
    for i in range(config.n_layers):
        h, blk = f"transformer.h.{i}.", f"blk.{i}."
        for theirs, ours in (
            ("ln1", "attn_norm"),
            ("ln2", "ffn_norm"),
            ("attn.c_proj", "attn_output"),
            ("mlp.fc", "ffn_up"),
            ("mlp.proj", "ffn_down"),
            *((("mlp.gate", "ffn_gate"),) if config.arch == "tcllama" else ()),
        ):
            names.move(h + theirs, blk + ours)
        names.move(h + "attn.c_attn", blk + "attn_qkv")  # queries, keys and values in one
        layer = config.layer(i)
        heads = (layer.n_heads, layer.n_kv_heads, layer.n_kv_heads)
        for end in (".weight", ".bias"):
            fused = names.out.pop(blk + "attn_qkv" + end, None)
            start, total = 0, sum(heads) * config.head_dim
            for name, count in zip(("attn_q", "attn_k", "attn_v"), heads, strict=True):
                if fused is not None:
                    rest = fused.check((total, C) if end == ".weight" else (total,)).shape[1:]
                    rows = slice(start, start + count * config.head_dim)
                    names.out[blk + name + end] = fused.changed((rows.stop - start, *rest), itemgetter(rows))
                    start = rows.stop
        trainer_args.take_memory(names, config, i, h + "attn.", args)
    names.finish()
    return names
