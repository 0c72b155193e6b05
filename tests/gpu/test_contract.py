"""The contracts of every mechanism, of sessions and of the golden checkpoints, on the CUDA backend.

The tests are those of test_memory, test_engine and test_golden, with the same thresholds; here a pass runs the kernels.
"""

from host_device import backend, device  # noqa: F401
from test_golden import test_golden, test_golden_with_keys_and_values_in_half  # noqa: F401
from test_memory import (  # noqa: F401
    test_a_cache_that_is_not_full_is_full_attention,
    test_any_chunks_give_the_same_answers,
    test_causality,
    test_in_cache_positions_depend_on_the_cache_alone,
    test_limits_that_are_a_plainer_memory,
    test_memory_is_silent_until_something_was_read_that_left,
    test_parity,
    test_prompts_longer_than_one_pass,
    test_snapshot_restore_fork,
    test_without_gate_or_write_rate_or_eviction_the_first_level_is_left,
)
