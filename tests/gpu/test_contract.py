"""The contract of every mechanism on the CUDA backend: the tests of test_memory, with the same thresholds as numba's.

What takes minutes is in test_contract_slow.py.
"""

from host_device import backend, device  # noqa: F401
from test_memory import (  # noqa: F401
    test_a_cache_that_is_not_full_is_full_attention,
    test_in_cache_positions_depend_on_the_cache_alone,
    test_limits_that_are_a_plainer_memory,
    test_memory_is_silent_until_something_was_read_that_left,
    test_parity,
    test_without_gate_or_write_rate_or_eviction_the_first_level_is_left,
)
