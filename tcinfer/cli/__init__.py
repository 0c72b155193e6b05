"""The command line: glue only. stdout carries results, stderr everything else.

`console.py` has what commands share, `options.py` the options of several; each other file is a group of commands.
"""

from __future__ import annotations

import os
import sys

import click

from tcinfer import __version__
from tcinfer.cli import chat, files, generate, machine, measure, sessions
from tcinfer.cli.console import INTERRUPTED, close_stdout, complain, use_utf8
from tcinfer.errors import TcinferError

COMMANDS = (
    generate.generate,
    chat.chat,
    sessions.absorb,
    sessions.session,
    files.convert,
    files.quantize,
    files.inspect,
    measure.bench,
    measure.perplexity,
    machine.warmup,
    machine.doctor,
    machine.completion,
)


def main() -> None:
    """The `tcinfer` command: one line on stderr and status 1 for every error of the user's, never a traceback."""
    status = 1
    try:
        use_utf8()
        if machine.COMPLETE in os.environ:  # a shell asks what could come next
            raise click.exceptions.Exit(machine.complete(cli, os.environ[machine.COMPLETE]))
        # not cli(): it has an exit status and a line of its own for a closed pipe and for Ctrl-C
        with cli.make_context("tcinfer", sys.argv[1:]) as context:
            cli.invoke(context)
        sys.stdout.flush()
        status = 0
    except click.exceptions.Exit as e:  # --help, --version
        status = e.exit_code
    except click.exceptions.NoArgsIsHelpError as e:  # a group alone
        click.echo(e.format_message(), err=True)
    except click.ClickException as e:  # no such option, no number where one is needed
        command = e.ctx.command_path if isinstance(e, click.UsageError) and e.ctx else "tcinfer"
        complain(f"{' '.join(e.format_message().split())} See: {command} --help")
    except TcinferError as e:
        complain(str(e))
    except (KeyboardInterrupt, click.Abort):
        status = INTERRUPTED
    except BrokenPipeError:  # the reader has had enough (`| head`): that is no error
        status = 0
    except OSError as e:  # a full disk under stdout, a path that no system takes
        loading = f"a library cannot be loaded ({e}); a limit on memory (ulimit -v) may be why"
        complain(f"{e.filename or 'the output cannot be written'}: {e.strerror}" if e.strerror else loading)
    except MemoryError:
        complain("this machine has not enough memory for that")
    close_stdout()
    sys.exit(status)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="tcinfer %(version)s")
def cli() -> None:
    """Run Tensor Cache transformers, and plain Llama-family models, in memory that does not grow.

    Exit status: 0, also when the reader of a pipe had enough; 1 for every error, which is one line on stderr; 130 after
    Ctrl-C; 143 after SIGTERM.
    """


for command in COMMANDS:
    cli.add_command(command)


def _with_help(command: click.Command) -> None:
    """Read help from the source, since Python's -OO drops the docstrings that it stands in."""
    import ast
    import inspect
    from textwrap import dedent

    (function,) = ast.parse(dedent(inspect.getsource(command.callback))).body  # type: ignore[arg-type]
    command.help = ast.get_docstring(function)  # type: ignore[arg-type]
    for below in getattr(command, "commands", {}).values():
        _with_help(below)


if sys.flags.optimize > 1:
    _with_help(cli)
