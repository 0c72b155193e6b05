"""`tcinfer chat`."""

from __future__ import annotations

import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tcinfer.cli.console import argument, terminated
from tcinfer.cli.options import (
    banned_option,
    model_options,
    notice,
    read_text,
    sampling,
    sampling_options,
    stop_option,
)
from tcinfer.config import check_count
from tcinfer.errors import TcinferError
from tcinfer.sampling import strings

if TYPE_CHECKING:
    from tcinfer.chat.conversation import Conversation
    from tcinfer.chat.launch import Chats


@click.command()
@model_options
@click.option("-sys", "--system", metavar="TEXT", help="The system prompt.")
@click.option("--chat-template", metavar="FILE", help="A Jinja template in place of the model's own; or: chatml.")
@click.option("-c", "--continue", "resume", is_flag=True, help="Go on with the last conversation (or --name's).")
@click.option("--name", metavar="NAME", help="The conversation's name; without it, the time.")
@click.option("--no-save", is_flag=True, help="Keep nothing on disk but what /save writes.")
@click.option(
    "-n", "--max-tokens", type=int, default=1024, show_default=True, metavar="N", help="Of an answer; -1: no end."
)
@sampling_options
@stop_option
@banned_option
@click.option("-q", "--quiet", is_flag=True, help="No greeting.")
def chat(**options: Any) -> None:
    """Talk with a model for as long as you like: memory does not grow, and nothing is read twice.

    Ctrl-C stops an answer, not the program. Every turn is saved as it ends. /help lists the commands. A plain model
    runs in sinks memory, the system prompt kept for ever, unless --memory says otherwise. Without a terminal, each
    line of standard input is a message.

    \b
    Examples:
      tcinfer chat -m SmolLM2-135M-Instruct.Q4_1.gguf -sys "Answer in one sentence."
      tcinfer chat --continue
      echo "Who are you?" | tcinfer chat -m model.gguf -n 100 --temp 0
    """
    from tcinfer.chat import store
    from tcinfer.cli.repl import Repl

    check_count("max_tokens", options["max_tokens"], -1)
    if sys.stdin is None:
        raise TcinferError("standard input is closed: there is nobody to talk with")
    stop, banned = (
        strings(f"{name} strings", [argument(text) for text in options[name]]) for name in ("stop", "banned")
    )
    unsaved = options["no_save"]
    if unsaved and (options["resume"] or options["name"] is not None):
        raise TcinferError("--no-save is for a new conversation without a name")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, terminated)  # so that the terminal is as it was, and a temporary folder is removed
    with store.temporary() if unsaved else nullcontext(store.chats()) as folder:
        conversation, chats = _begun(folder, options)
        conversation.max_tokens, conversation.stop, conversation.banned = options["max_tokens"], stop, banned
        repl = Repl(chats, conversation, unsaved)
        try:
            if not options["quiet"]:
                repl.greet()
            repl.run()
        finally:
            repl.conversation.close()


def _begun(folder: Path, options: dict[str, Any]) -> tuple[Conversation, Chats]:
    """The conversation asked for, a new one or an old one, and what others are made with."""
    from tcinfer.chat import store
    from tcinfer.chat.launch import Chats
    from tcinfer.chat.template import CHATML
    from tcinfer.engine import backend

    path, name, template = options["model"], options["name"], options["chat_template"]
    if template is not None:
        template = CHATML if template == "chatml" else read_text(template)
    asked = {key: options[key] for key in ("memory", "window", "sinks", "cache_type")}
    if options["resume"]:
        if options["system"] is not None or any(value is not None for value in asked.values()):
            raise TcinferError("--continue goes on with the memory and system prompt that the conversation has")
        known = store.names(folder)
        if not known:
            raise TcinferError(f"there is no conversation in {folder} to go on with")
        name = known[0] if name is None else name
        path = store.start_of(folder, name)["model"] if path is None else path
    engine = backend(options["backend"], options["threads"])
    chats = Chats(path, folder, engine, asked, template, sampling(options), notice)
    system = None if options["system"] is None else argument(options["system"])
    return chats.resume(name) if options["resume"] else chats.begin(system, name), chats
