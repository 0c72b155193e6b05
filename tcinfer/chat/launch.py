"""From a model file to conversations with it: which memory they get, where they begin or go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tcinfer import memory, session_file
from tcinfer.api import Model
from tcinfer.atomic import copy
from tcinfer.chat import store
from tcinfer.chat.conversation import Conversation
from tcinfer.chat.store import Log
from tcinfer.chat.template import ChatTemplate, fill
from tcinfer.config import DEFAULT_SINKS, DEFAULT_WINDOW
from tcinfer.engine.base import Backend
from tcinfer.errors import TcinferError
from tcinfer.loader import Opened
from tcinfer.memory_options import with_memory
from tcinfer.sampling import Sampling
from tcinfer.tokenizer import CHAT_TEMPLATE

LARGEST_WINDOW = 1024  # tokens, that a plain model gets unless told otherwise
PINNED = 32 * 2**20  # bytes of a system prompt's keys and values that are kept for ever

Notice = Callable[[str], None]


class Chats:
    """All conversations with one model file."""

    def __init__(
        self,
        path: str | None,
        folder: Path,
        backend: Backend,
        asked: dict[str, Any],
        template: str | None,
        sampling: Sampling,
        notice: Notice,
    ) -> None:
        """folder: where conversations are kept (store.py); asked: memory, window, sinks and cache_type as
        `tcinfer.load` takes them; template: a Jinja text in place of the file's own; notice: is told in a line what
        people should know, once. Raises TcinferError."""
        self.opened = Opened(path)
        self.folder = folder
        self.sampling = sampling
        self._backend, self._asked, self._notice = backend, asked, notice
        self._said: set[str] = set()
        self._model: Model | None = None
        self._source = template
        self._templates: dict[str | None, ChatTemplate] = {}

    def begin(self, system: str | None, name: str | None = None, base: Path | None = None) -> Conversation:
        """A new conversation; base: a session file that it goes on from."""
        if self._template(self._source).rewrites_history(system is not None):
            self._once("this chat template writes earlier turns anew; here they stay as they were read")
        if base is None:
            options = self._options(system)
        else:
            found = session_file.read(base)
            options = found.memory_options(self.opened.config)
            self._load(options).attach(found)
        fingerprint = self._load(options).fingerprint.hex()
        start: dict[str, Any] = {"model": str(self.opened.path.resolve()), "fingerprint": fingerprint}
        start |= {"system": system, "memory": options, "template": self._source}
        log = store.begin(self.folder, start) if name is None else Log(self.folder, name, start)
        if base is not None:
            try:
                copy(base, log.base_path, private=True)
            except BaseException:
                log.close()
                raise
        return self._conversation(log)

    def resume(self, name: str) -> Conversation:
        """Go on with the conversation of this name. Raises TcinferError where it is not, or is another model's."""
        return self._conversation(Log(self.folder, name))

    def _conversation(self, log: Log) -> Conversation:
        try:
            options = log.start.get("memory")
            if not isinstance(options, dict) or set(options) != {"memory", "window", "sinks", "cache_type"}:
                raise TcinferError(f"{log.path}: does not say with which memory it ran")
            model = self._load(options)
            if log.start.get("fingerprint") != model.fingerprint.hex():
                made_by = log.start.get("model")
                raise TcinferError(f"conversation {log.name!r} is of another model, {made_by}: name it with -m")
            return Conversation(model, self._template(log.start.get("template", self._source)), log, self.sampling)
        except BaseException:
            log.close()
            raise

    def _template(self, own: Any) -> ChatTemplate:
        """A template of the user's, or else the model's; rendered once."""
        if own not in self._templates:
            source = self.opened.metadata.get(CHAT_TEMPLATE) if own is None else own
            if source is None:
                self._once("this model has no chat template of its own: ChatML is used (--chat-template takes another)")
            elif not isinstance(source, str):
                raise TcinferError(f"{self.opened.path}: {CHAT_TEMPLATE} is no text; use --chat-template chatml")
            tokenizer = self.opened.tokenizer
            bos, eos = tokenizer.bos_id, min(tokenizer.eos_ids, default=None)
            self._templates[own] = ChatTemplate(source, tokenizer.control_text(bos), tokenizer.control_text(eos))
        return self._templates[own]

    def _load(self, options: dict[str, Any]) -> Model:
        """The model with this memory: the one at hand, if it has it."""
        wanted = with_memory(self.opened.config, **options)
        if self._model is None or self._model.config != wanted:
            self._model = self.opened.model(self._backend, **options, notice=self._notice)
        return self._model

    def _options(self, system: str | None) -> dict[str, Any]:
        """The memory of a new conversation.

        A plain model, whose cache would grow, gets sinks unless another memory is asked for. In sinks memory the
        system prompt is pinned: it is among the tokens that never leave.
        """
        asked, config = dict(self._asked), self.opened.config
        mode = asked["memory"]
        if mode is None:
            mode = asked["memory"] = "sinks" if not config.widest.window else config.farthest
        if mode != "sinks":
            return asked
        pinned = self._pinned(system)
        if asked["sinks"] is None:
            asked["sinks"] = config.widest.sinks if config.widest.memory == "sinks" else DEFAULT_SINKS
        asked["sinks"] = max(asked["sinks"], pinned)
        if asked["window"] is None and config.widest.memory == "full":
            trained = min(config.context_length or DEFAULT_WINDOW, LARGEST_WINDOW)
            asked["window"] = max(trained - asked["sinks"], trained // 2)
        return asked

    def _pinned(self, system: str | None) -> int:
        """Tokens of the system prompt and what stands before it, as many as may be kept for ever."""
        tokenizer, config = self.opened.tokenizer, self.opened.config
        parts = fill(self._template(self._source).system_part(system is not None), system=system)
        count = len(tokenizer.encode_parts(parts, bos=tokenizer.add_bos))
        sizes = [
            memory.layout(with_memory(config, "sinks", 1, sinks, self._asked["cache_type"])).nbytes
            for sinks in (0, 1024)
        ]
        most = PINNED * 1024 // (sizes[1] - sizes[0])
        if count > most:
            self._once(f"the system prompt has {count:,} tokens, of which the first {most:,} are kept for ever")
        return min(count, most)

    def _once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._notice(text)
