"""Which mechanism a layer has. A mechanism is a file with an `Attention` of its own (window.py), and a row here."""

from collections.abc import Callable

from infini import InfiniAttention
from options import ModelArgs
from tensor_cache import TensorCacheAttention
from window import Attention

# the first that the options ask for
MECHANISMS: tuple[tuple[Callable[[ModelArgs], bool], type[Attention]], ...] = (
    (lambda args: args.infini_enabled, InfiniAttention),
    (lambda args: args.tc_enabled, TensorCacheAttention),
    (lambda args: True, Attention),
)


def attention(args: ModelArgs, layer: int) -> Attention:
    """A layer's attention, with what it remembers."""
    return next(kind for asked, kind in MECHANISMS if asked(args))(args, layer)
