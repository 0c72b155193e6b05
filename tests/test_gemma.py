"""Gemma 3 270M, a real file with a vocabulary of 262,144: its ids are llama.cpp's."""

import pytest
from gemma import gemma3

from tcinfer.reader import read
from tcinfer.tokenizer import from_metadata

# As llama-cpp-python 0.3.36 gives them, without BOS; control tokens only in the last one.
IDS = {
    "Hello world!": [9259, 1902, 236888],
    "  Two  spaces, 你好 🦙\n\n\n\tdef f(x):\n        return 3.14": [
        138, 11634, 138, 35220, 236764, 43758, 237389, 236743, 478, 397, 404, 391, 109, 255968, 2063, 517, 236769,
        236781, 1473, 107, 144, 2060, 236743, 236800, 236761, 236770, 236812,
    ],
    "<table><tr><td>a</td></tr>  <bos>": [168, 173, 175, 236746, 183, 181, 138, 236820, 46757, 236813],
    "<start_of_turn>user\nHi<end_of_turn>\n": [105, 2364, 107, 10979, 106, 107],
}  # fmt: skip


@pytest.mark.slow
def test_ids_are_llama_cpps():
    tokenizer = from_metadata(read(gemma3()).metadata, None)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (262_144, 2, {1}, True)
    for text, ids in IDS.items():
        assert tokenizer.encode(text, special=text.startswith("<start")) == ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
