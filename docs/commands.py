"""Write docs/commands.md: the help of every command, as the commands print it. `python docs/commands.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from tcinfer.cli import cli

WIDTH = 98  # columns: what click leaves of 100
HEAD = """# Every command and option

`python docs/commands.py` writes this page; a test sees that it is what the commands say. [chat.md](chat.md) tells how
chat, sessions and sampling are meant.
"""


def commands(command: click.Command, *names: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """A command and all below it, with their names."""
    yield names, command
    if isinstance(command, click.Group):
        for name, below in sorted(command.commands.items()):
            yield from commands(below, *names, name)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for names, command in commands(cli, "tcinfer"):
        context = None
        for name in names:
            context = click.Context(
                cli if context is None else context.command.commands[name],  # type: ignore[attr-defined]
                info_name=name,
                parent=context,
                terminal_width=WIDTH,
                max_content_width=WIDTH,
                help_option_names=["-h", "--help"],
            )
        assert context is not None
        parts.append(f"\n## {' '.join(names)}\n\n```text\n{command.get_help(context)}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
