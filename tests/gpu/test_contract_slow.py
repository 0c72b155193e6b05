"""The rest of the contract on the CUDA backend: chunks, copies, causality, long prompts, the golden checkpoints."""

import pytest
from host_device import backend, device  # noqa: F401
from test_golden import test_golden, test_golden_with_keys_and_values_in_half  # noqa: F401
from test_memory import (  # noqa: F401
    test_any_chunks_give_the_same_answers,
    test_causality,
    test_prompts_longer_than_one_pass,
    test_snapshot_restore_fork,
)
from test_session import test_threads_may_each_run_a_session_of_one_model  # noqa: F401

pytestmark = pytest.mark.slow
