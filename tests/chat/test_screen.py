"""Words that wrap at a terminal's edge."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcinfer.cli.screen import Wrapped


def shown(text: str, columns: int, parts: int = 1) -> str:
    out = io.StringIO()
    wrapped = Wrapped(out, lambda: columns)
    for i in range(0, len(text), parts):
        wrapped.write(text[i : i + parts])
    wrapped.write("\n")
    assert out.getvalue().endswith("\n")
    return out.getvalue()[:-1]


@pytest.mark.parametrize(
    ("text", "columns", "lines"),
    [
        ("one two three", 7, "one two\nthree"),
        ("one two three", 8, "one two\nthree"),
        ("one two  three", 20, "one two  three"),
        ("    code(here)\n  more", 20, "    code(here)\n  more"),
        ("a\n\nb\n", 5, "a\n\nb\n"),
        ("a \n b", 5, "a\n b"),
        ("a\tb", 9, "a\tb"),
        ("a\tb", 8, "a\nb"),
        ("漢字漢字", 5, "漢字\n漢字"),
        ("ab漢字", 5, "ab漢\n字"),
        ("e\u0301e\u0301 e\u0301", 4, "e\u0301e\u0301 e\u0301"),
        ("abcdefghij kl", 4, "abcdefghij\nkl"),  # the terminal itself goes on after d and h: ij is at 2
        ("abcdefghij k", 4, "abcdefghij k"),
        ("", 4, ""),
        ("  ", 4, ""),
    ],
)
def test_lines(text: str, columns: int, lines: str) -> None:
    assert shown(text, columns) == lines


@given(st.text("ab e\u0301\t\n漢,", max_size=60), st.integers(2, 12), st.integers(1, 7))
def test_only_spaces_become_line_ends_and_parts_do_not_matter(text: str, columns: int, parts: int) -> None:
    lines = shown(text, columns, parts)
    assert lines == shown(text, columns)
    assert re.sub(r"\s", "", lines) == re.sub(r"\s", "", text)
    assert lines.count("\n") >= text.rstrip(" \t").count("\n")
    words = [w for w in re.split(r"\s|(?<=漢)|(?=漢)", text) if w]
    assert [w for w in re.split(r"\s|(?<=漢)|(?=漢)", lines) if w] == words  # none is torn
