"""Commands about this machine: warmup, doctor, completion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMPLETE = "_TCINFER_COMPLETE"  # in the environment: what click's completion scripts ask
FILES = ("FILE", "CKPT", ".")  # what only the metavars of options and arguments have that take a file


@click.command()
def warmup() -> None:
    """Compile everything for this CPU now, so that no first run waits for it."""
    from tcinfer.engine import backend
    from tcinfer.progress import bar

    backend("numba")  # or the reason why there is none
    from tcinfer.engine.compiled import warm_up
    from tcinfer.kernels.cpu.jit import cache_folder

    steps = warm_up()
    total = next(steps)
    with bar("compiling", total) as advance:
        for _ in steps:
            advance(1)
    where = cache_folder()
    click.echo(
        f"{total} operators ready in {where}" if where else "compiled, but there is no private folder to keep it in"
    )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The same as one JSON object.")
def doctor(as_json: bool) -> None:
    """Show what this machine offers tcinfer; the last line says what is missing. Exit status 1: it cannot run."""
    import json

    from tcinfer.measure.machine import facts, report

    found = facts()
    click.echo(json.dumps(found, indent=2) if as_json else report(found))
    if found["broken"]:
        click.get_current_context().exit(1)


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")), metavar="bash|zsh|fish")
def completion(shell: str) -> None:
    """Print a script that completes commands, options and files as you type.

    \b
    bash  eval "$(tcinfer completion bash)"             in ~/.bashrc
    zsh   eval "$(tcinfer completion zsh)"              in ~/.zshrc, after compinit
    fish  tcinfer completion fish > ~/.config/fish/completions/tcinfer.fish
    """
    root = click.get_current_context().find_root().command
    click.get_current_context().exit(complete(root, f"{shell}_source"))


def complete(cli: click.Command, instruction: str) -> int:
    """Print what `instruction`, of one of click's scripts, asks for; returns the exit status."""
    from click.shell_completion import shell_complete

    _offer_files(cli)
    try:
        return shell_complete(cli, {}, "tcinfer", COMPLETE, instruction)
    except (KeyError, ValueError):  # no script asked: what it would say of the words is not there
        return 1


def _offer_files(command: click.Command) -> None:
    for param in command.params:
        if any(part in (param.metavar or "") for part in FILES):
            param.type = _File()
    for sub in command.commands.values() if isinstance(command, click.Group) else ():
        _offer_files(sub)


class _File(click.types.StringParamType):
    """A name that the shell itself completes."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]
