"""What a model file holds: `facts` reads it into plain values, `report` sets them out for people."""

from __future__ import annotations

import json
import math
import re
import textwrap
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from statistics import median
from typing import Any

from numpy.typing import NDArray

from tcinfer import memory, tokenizer
from tcinfer.config import LAYERED, LayerConfig, ModelConfig
from tcinfer.gguf import reader
from tcinfer.loader import Opened, bind
from tcinfer.memory_options import with_memory

SIZES = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size", "context_length", "norm_eps")
POSITIONS = ("rope_dim", "rope_base", "rope_scaling", "rope_factor")
FIRST_LEVEL = ("window", "sinks", "sink_positions", "key_conv", "cache_type")
ROOMS = memory.rooms()
LEARNED = {fact: title for room in ROOMS for fact, title in room.LEARNED.items()}  # what the report calls them
WIDTH, LABEL = 110, 22  # columns of the report, and of its first one
ROOM = WIDTH - 14  # columns for one quantity, beside the number of the layer
LONGEST = 60  # characters that it shows of a name or a token
STEP = 64  # tokens by which a cache grows in whole cache lines, whatever its heads are


def facts(path: str | PathLike[str] | None = None, **asked: Any) -> dict[str, Any]:
    """All of it as plain values, ready for JSON; without a path, of the bundled model.

    asked: memory, window, sinks, cache_type as `tcinfer.load` takes them, in place of the file's.

    Raises TcinferError for a file that this version cannot run.
    """
    opened = Opened(path)
    file = opened.file
    with opened.named():
        weights = bind(opened.config, file.tensors)
    config = with_memory(opened.config, **asked)
    layers: list[dict[str, NDArray]] = [{} for _ in range(config.n_layers)]
    for name, values in weights.items():
        if name.startswith("blk."):
            _, i, rest = name.split(".", 2)
            layers[int(i)][rest] = values
    return {
        "path": str(file.path),
        "bytes": file.path.stat().st_size,
        "gguf_version": file.version,
        "architecture": config.arch,
        "name": config.name,
        "sizes": {name: _listed(getattr(config, name)) for name in SIZES},
        "positions": {name: _listed(getattr(config, name)) for name in POSITIONS},
        "parameters": sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
        "tensors": len(file.tensors),
        "tensor_types": _types(file.tensors),
        "tokenizer": _tokenizer(file.metadata, opened.tokenizer),
        "chat_template": _template(file.metadata.get(tokenizer.CHAT_TEMPLATE)),
        "memory": {
            "mechanism": _listed(config.memory),
            **{name: _listed(getattr(config, name)) for name in FIRST_LEVEL},
            "options": _options(config),
        },
        "layers": [{"layer": i, **_own(config.layers[i]), **_learned(config, i, w)} for i, w in enumerate(layers)],
        "state": _state(config),
    }


def _types(tensors: Mapping[str, reader.TensorInfo]) -> list[dict[str, Any]]:
    """For each type its tensors, bytes, and what they are called in any layer, the type with most bytes first.

    Names of one beginning are told as one where all of them are of the type; "(3 of 30)" are those in some layers.
    """
    kinds: dict[str, Counter[str]] = {}  # by name without the layer
    totals: dict[str, list[int]] = {}
    for tensor in tensors.values():
        name = re.sub(r"^blk\.\d+\.", "", tensor.name).removesuffix(".weight")
        kinds.setdefault(name, Counter())[tensor.kind.name] += 1
        total = totals.setdefault(tensor.kind.name, [0, 0])
        total[0] += 1
        total[1] += tensor.data.nbytes
    families: dict[str, list[str]] = {}
    for name in kinds:
        families.setdefault(_family(name), []).append(name)
    names: dict[str, list[str]] = {kind: [] for kind in totals}
    for family, members in families.items():
        found = set().union(*(kinds[name] for name in members))
        if len(members) > 1 and len(found) == 1:
            names[found.pop()].append(family)
            continue
        for name in members:
            for kind, n in kinds[name].items():
                names[kind].append(name if len(kinds[name]) == 1 else f"{name} ({n} of {kinds[name].total()})")
    return [
        {"type": kind, "tensors": count, "bytes": nbytes, "names": names[kind]}
        for kind, (count, nbytes) in sorted(totals.items(), key=lambda item: -item[1][1])
    ]


def _family(name: str) -> str:
    """What a tensor's name shares with its like; the memory's biases go with the memory."""
    if "norm" in name:
        return "*_norm"
    if name.endswith(".bias") and not name.startswith(tuple(room.PREFIX for room in ROOMS if room.PREFIX)):
        return "*.bias"
    return name.split("_")[0] + "_*"


def _tokenizer(metadata: Mapping[str, Any], found: tokenizer.Tokenizer) -> dict[str, Any]:
    kind = metadata.get(tokenizer.MODEL, "none")
    texts: dict[int, str] = {}
    if tokenizer.HUGGINGFACE_JSON in metadata:
        kind = "tokenizer.json"
        added = json.loads(metadata[tokenizer.HUGGINGFACE_JSON]).get("added_tokens") or ()
        texts = {token["id"]: token["content"] for token in added}
    elif found.vocab_size:
        texts = dict(enumerate(metadata[tokenizer.TOKENS]))

    def named(token: int) -> dict[str, Any]:
        return {"id": token, "text": texts.get(token)}

    pre = metadata.get(tokenizer.PRE)
    return {
        "kind": kind,
        "pre": pre if isinstance(pre, str) else None,
        "tokens": found.vocab_size,
        "bos": None if found.bos_id is None else named(found.bos_id),
        "eos": [named(token) for token in sorted(found.eos_ids)],
        "adds_bos": found.add_bos,
    }


def _template(template: object) -> dict[str, Any] | None:
    if not isinstance(template, str):
        return None
    return {"characters": len(template), "chatml": "<|im_start|>" in template}


def _listed(value: Any) -> Any:
    """What differs from layer to layer, as a list."""
    return list(value) if type(value) is tuple else value


def _own(layer: LayerConfig) -> dict[str, Any]:
    """In what layers may differ."""
    return {name: getattr(layer, name) for name in LAYERED if name != "options"}


def _options(config: ModelConfig) -> dict[str, Any]:
    """The options of all mechanisms, as the first layer has them that has one."""
    found: dict[str, Any] = {}
    for layer in dict.fromkeys(config.layers):
        found = (asdict(layer.options) if layer.options is not None else {}) | found
    return found


def _learned(config: ModelConfig, layer: int, w: Mapping[str, NDArray]) -> dict[str, Any]:
    """What a layer's memory has learned, by the names of its room; None is what it does not have."""
    room = memory.room(config.layers[layer].memory)
    found = room.learned(w) if room.LEARNED else {}
    return dict.fromkeys((*LEARNED, "decay")) | {"token_dependent": []} | found


def _state(config: ModelConfig) -> dict[str, Any]:
    """Bytes of a session, or by how many it grows; and the tokens from which a full cache has more."""

    def cached(tokens: int) -> int:
        return memory.layout(full, tokens).nbytes

    full = with_memory(config, "full")
    state: dict[str, Any] = {
        "bounded": memory.bounded(config),
        "bytes": None,
        "full_cache_bytes_per_token": (cached(1 + STEP) - cached(1)) // STEP,
        "full_cache_larger_from": None,
    }
    if state["bounded"]:
        state["bytes"] = memory.layout(config).nbytes
        state["full_cache_larger_from"] = bisect_right(range(2**40), state["bytes"], key=cached)
    return state


def report(found: Mapping[str, Any]) -> str:
    """`facts` as a table of at most WIDTH columns below the file's name, in printable characters alone."""
    sizes, template, kept, state = (found[name] for name in ("sizes", "chat_template", "memory", "state"))
    layers = found["layers"]
    style = template and ("ChatML" if template["chatml"] else "not ChatML")
    rows = [
        ("arch", found["architecture"]),
        ("name", _cut(found["name"])),
        ("layers", "{n_layers}, {d_model} wide, ".format(**sizes) + _spread(layers, "{d_ff} in the feed-forward")),
        ("heads", _spread(layers, f"{{n_heads}} of {sizes['head_dim']} channels, {{n_kv_heads}} of keys and values")),
        ("positions", _rotary(found["positions"], layers)),
        ("vocabulary", f"{sizes['vocab_size']:,}"),
        ("trained on", f"{sizes['context_length']:,} tokens at most" if sizes["context_length"] else "not said"),
        ("parameters", f"{found['parameters']:,} in {found['tensors']} tensors"),
        *((f"  {kind['type']}", _tensors(kind)) for kind in found["tensor_types"]),
        ("tokenizer", _vocabulary(found["tokenizer"])),
        ("chat template", f"{style}, {template['characters']:,} characters" if template else "none"),
        ("memory", _spread(layers, "{memory}")),
        ("window", _spread(layers, "{window:,} tokens", "window")),
        ("sinks", _spread(layers, "{sinks}, positions {sink_positions}", "sinks")),
        ("key convolution", _spread(layers, "{key_conv} taps", "key_conv")),
        ("options", ", ".join(f"{name}={_value(value)}" for name, value in kept["options"].items()) or "none"),
    ]
    if state["bounded"]:
        more = f"a full cache of {kept['cache_type']} takes more from {state['full_cache_larger_from']:,} tokens on"
        rows += [("state", f"{state['bytes']:,} bytes a session, whatever its length"), ("", more)]
    else:
        rows += [("state", f"grows by {state['full_cache_bytes_per_token']:,} bytes a token")]
    lines = [f"{found['path']}: GGUF version {found['gguf_version']}, {found['bytes']:,} bytes"]
    lines += [line for label, text in rows for line in _row(label, text)] + _tables(found["layers"])
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _row(label: str, text: str) -> list[str]:
    first, rest = f"{label:<{LABEL}}", " " * LABEL
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False) or [label]


def _tensors(kind: Mapping[str, Any]) -> str:
    return f"{kind['tensors']}, {kind['bytes']:,} bytes: {', '.join(kind['names'])}"


def _spread(layers: list[dict[str, Any]], text: str, needs: str = "") -> str:
    """A text about each layer, or "none" where it has not what is needed; once for all that are alike."""
    found: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        found.setdefault(text.format(**layer) if not needs or layer[needs] else "none", []).append(i)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{one} in layer{'s' * (len(those) > 1)} {_ranges(those)}" for one, those in found.items())


def _ranges(numbers: list[int]) -> str:
    """Rising numbers as people list them: 0-4, 6."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _rotary(positions: Mapping[str, Any], layers: list[dict[str, Any]]) -> str:
    if positions["rope_dim"] == 0:
        return "learned"
    each = [{**layer, "scaling": ""} for layer in layers]
    for layer in each:
        if layer["rope_scaling"] != "none":
            layer["scaling"] = ", scaled by {rope_factor:g} ({rope_scaling})".format(**layer)
    return _spread(each, "rotary, base {rope_base:g}{scaling}", "rope_dim")


def _vocabulary(told: Mapping[str, Any]) -> str:
    def shown(token: Mapping[str, Any]) -> str:
        return f"{token['id']} {_cut(token['text'] or '')}".strip()

    if not told["tokens"]:
        return "none"
    kind = f"{told['kind']} ({told['pre']})" if told["pre"] else told["kind"]
    bos = f"{shown(told['bos'])}, {'added' if told['adds_bos'] else 'not added'}" if told["bos"] else "none"
    return f"{kind}, {told['tokens']:,} tokens; BOS {bos}; EOS {', '.join(map(shown, told['eos'])) or 'none'}"


def _tables(layers: list[dict[str, Any]]) -> list[str]:
    """What the memory of each layer has learned: a line a layer, as many quantities side by side as there is room."""
    layers = [layer for layer in layers if any(layer[name] is not None for name in LEARNED)]
    labels = ["learned", *(f"  layer {layer['layer']}" for layer in layers)]
    labels = [f"{label:<{max(map(len, labels))}}" for label in labels]
    tables: list[list[list[str]]] = []
    for column in _columns(layers):
        if not tables or sum(len(part[0]) + 3 for part in tables[-1]) + len(column[0]) > WIDTH:
            tables.append([labels])
        tables[-1].append(column)
    return ["   ".join(parts).rstrip() for table in tables for parts in zip(*table, strict=True)]


def _columns(layers: list[dict[str, Any]]) -> list[list[str]]:
    """Each quantity as lines of one width: its title, then its values in every layer."""
    columns = []
    for name, title in LEARNED.items():
        values = [layer[name] for layer in layers]
        some = next((value for value in values if value is not None), None)
        if some is None:
            continue
        title += ", base + token term" * any(name in layer["token_dependent"] for layer in layers)
        if not isinstance(some, list):
            columns.append(_column(title, [None if value is None else [value] for value in values]))
        elif not isinstance(some[0], list):
            columns.append(_column(title, values))
        else:
            speeds = ("",) if len(some) == 1 else (", fast", ", slow")
            for i, speed in enumerate(speeds):
                rows = [value[i] if value is not None and i < len(value) else None for value in values]
                columns.append(_column(title + speed, rows))
    return columns


def _column(title: str, rows: list[list[float | None] | None]) -> list[str]:
    """The heads side by side, or of many their least, median and largest; "-" for a layer that has no such thing."""
    numbers = [None if row is None else [math.inf if x is None else x for x in row] for row in rows]
    there = [row for row in numbers if row is not None]
    wide = max(len(_short(x)) for row in there for x in row)
    if (wide + 1) * max(map(len, there)) > ROOM + 1:
        title += " (least, median, largest)"
        numbers = [None if row is None else [min(row), median(row), max(row)] for row in numbers]
    lines = [title, *("-" if row is None else " ".join(f"{_short(x):>{wide}}" for x in row) for row in numbers)]
    return [f"{line:<{max(map(len, lines))}}" for line in lines]


def _short(x: float) -> str:
    if x == math.inf:
        return "never"
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def _value(option: object) -> str:
    if isinstance(option, bool):
        return "yes" if option else "no"
    return f"{option:g}" if isinstance(option, float) else str(option)  # a float32 has no more digits than that


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
