"""What a model of the trainer is: the published checkpoints' `model_args`, and the options beyond them."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from scan import CHUNK


@dataclass(frozen=True)
class ModelArgs:
    """The published keys in their order (docs/mechanisms.md, "Published checkpoints"), then what is not published:
    absent from a checkpoint means the default, which is the published behaviour ("Tensor Cache" there)."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    bias: bool = False
    vocab_size: int = 50304
    dropout: float = 0.0
    use_rope: bool = True
    rope_base: int = 10000
    use_kv_cache: bool = True
    kv_window: int = 512  # W, sinks included; 0 is full attention
    kv_num_sinks: int = 0
    tc_enabled: bool = True
    tc_layers: int = -1  # -1: every layer remembers; n: the top n do
    tc_update_rule: str = "delta"
    tc_write_on_evict: bool = True
    tc_write_on_insert: bool = False
    tc_freeze_decay_lr: bool = False
    tc_two_timescales: bool = False
    tc_chunk_size: int = CHUNK  # speed only: the chunk form is exact
    tc_decay_init: float = 0.995
    tc_lr_init: float = 0.05
    tc_gate_init: float = -2.0
    tc_normalize_k: bool = True
    tc_normalize_q: bool = False
    tc_value_scale: float = 1.0
    tc_decay_slow_init: float = 0.9995
    tc_lr_slow_init: float = 0.01
    tc_alpha_init: float = 0.5
    tc_num_slots: int = 1
    tc_read_topk: int = 1
    tc_router_temp: float = 1.0
    tc_write_route: str = "k"
    tc_use_in_full_forward: bool = True
    tc_per_token_gate: bool = False
    tc_normalize_read: bool = False
    tc_normalize_read_eps: float = 1.0
    infini_enabled: bool = False
    infini_update_rule: str = "delta"
    infini_segment_size: int = 256
    # beyond the published ones
    tc_write_then_read: bool = False  # a step's eviction is written before that step's read: no blind spot
    tc_rope: bool = True  # False: the memory sees queries and keys before rotation
    tc_token_rate: bool = False  # a write rate of each token's own
    tc_token_decay: bool = False
    key_conv: int = 0  # taps of the causal convolution on the keys: 0 or 2
    block: str = "gpt"  # "llama": RMSNorm, SwiGLU, half-split rotation
    n_kv_head: int = 0  # key heads, 0: as many as n_head
    n_inner: int = 0  # width of the MLP, 0: 4 n_embd (gpt), or what has about as many weights in three matrices (llama)

    def __post_init__(self) -> None:
        if self.block == "llama" and not self.n_inner:
            object.__setattr__(self, "n_inner", -(-8 * self.n_embd // 3 // 32) * 32)
        for name, value in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"the trainer supports only {name}={value}, not {getattr(self, name)}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, not {getattr(self, name)!r}")
        if self.n_embd % self.n_head or self.n_head % self.kv_heads:
            raise ValueError(
                f"n_head {self.n_head} must divide n_embd, and n_kv_head {self.kv_heads} must divide n_head"
            )
        if self.use_rope and self.head_dim % 2:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of twice n_head {self.n_head}")
        if self.kv_num_sinks and self.tc_enabled and not self.infini_enabled:
            raise ValueError("a Tensor Cache has no sinks")
        if self.kv_num_sinks and not self.kv_num_sinks < self.kv_window:
            raise ValueError(f"kv_num_sinks {self.kv_num_sinks} leaves no room in kv_window {self.kv_window}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def ring(self) -> int:
        """Tokens of the window that are not sinks; 0: unbounded."""
        return self.kv_window - self.kv_num_sinks

    @property
    def interleaved(self) -> bool:
        """Which channels rotate together: neighbours, or those half a head apart."""
        return self.block == "gpt"

    @property
    def inner(self) -> int:
        return self.n_inner or 4 * self.n_embd

    def saved(self) -> dict[str, Any]:
        """The checkpoint's entry: every published key, and those beyond that are not at their defaults."""
        names = [f.name for f in fields(self)]
        beyond = names[names.index("tc_write_then_read") :]
        return {k: v for k, v in asdict(self).items() if k not in beyond or v != getattr(ModelArgs, k)}


# Options of the published model that this trainer does not build, with the only value it takes.
FIXED = {
    "bias": False,
    "use_rope": True,
    "use_kv_cache": True,
    "tc_write_on_evict": True,
    "tc_write_on_insert": False,
    "tc_two_timescales": False,
    "tc_num_slots": 1,
    "tc_use_in_full_forward": True,
    "tc_normalize_read": False,
}
CHOICES = {
    "tc_update_rule": ("outer", "delta", "wedge"),
    "infini_update_rule": ("linear", "delta"),
    "key_conv": (0, 2),
    "block": ("gpt", "llama"),
}
