"""A conversation with a model, which streams its answers, with the adapter or without.

Prompts are rendered as training rendered them. When the context is full the oldest question and answer are
left out, with a notice. An answer runs in a thread of its own, so that Ctrl-C can end it and keep the rest.

source  tests/test_chat.py
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from .errors import UserError
from .generate import Answer, allowances, context_length, generate

Message = dict[str, str]  # {"role": "user" or "assistant", "content": text}


class Adapters(Protocol):
    """What we need of adapt.Adapters."""

    def disabled(self) -> AbstractContextManager[Any]: ...
    def eval(self) -> None: ...


class Render(Protocol):
    """data.render_prompt: the ids that stand before an answer."""

    def __call__(
        self, tokenizer: Any, style: Any, turns: Sequence[Message], system: str | None, /
    ) -> list[int]: ...


@dataclass(frozen=True)
class Reply:
    """The last answer: its text, its tokens, whether it ended by itself, and whether the base gave it."""

    text: str
    tokens: int
    stopped: bool
    base: bool


class Cancelled(Exception):
    """Raised inside generate to end an answer that nobody reads any more."""


class Conversation:
    """A conversation with one model, whose adapter can be switched off for an answer.

    base    True to answer without the adapter
    turns   what was said so far, and still fits
    prompt  the ids of the last prompt, as the model got them
    reply   the last answer that the conversation goes on with
    replies the last answer of each side: True is the base's
    notice  called with a line for the user, such as that old turns were left out
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: Adapters | None,
        style: Any,
        *,
        render: Render,
        stop_ids: Sequence[int],
        pad_id: int,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        notice: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.tokenizer, self.adapters, self.style = model, tokenizer, adapters, style
        self.render, self.stop_ids, self.pad_id, self.system = render, list(stop_ids), pad_id, system
        self.max_new_tokens, self.temperature, self.top_p, self.seed = (
            max_new_tokens,
            temperature,
            top_p,
            seed,
        )
        self.notice = notice
        self.base = False
        self.turns: list[Message] = []
        self.prompt: list[int] = []
        self.reply: Reply | None = None
        self.replies: dict[bool, Reply] = {}
        if adapters is not None:
            adapters.eval()

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer in pieces of text as they come. What was given when the caller stops reading is kept.

        raises  UserError if the question alone does not fit into the model's context
        """
        asked = [*self.turns, {"role": "user", "content": text}]
        self.turns = asked = self.fit(asked)
        given = ""
        try:
            for piece in self.answer(asked, base=self.base):
                given += piece
                yield piece
        finally:
            self.turns = [*asked, {"role": "assistant", "content": given}] if given else asked[:-1]

    def compare(self, text: str) -> Generator[tuple[bool, str], None, None]:
        """Both answers to one question as (whether it is the base's, piece), the base first.

        The conversation goes on with the answer of the side that is active now.
        """
        asked = self.fit([*self.turns, {"role": "user", "content": text}])
        answers = {True: "", False: ""}
        try:
            for base in (True, False):
                yield base, ""  # a side that says nothing is seen too
                for piece in self.answer(asked, base=base):
                    answers[base] += piece
                    yield base, piece
        finally:
            kept = answers[self.base]
            self.turns = [*asked, {"role": "assistant", "content": kept}] if kept else asked[:-1]
            self.reply = self.replies.get(self.base)

    def reset(self) -> None:
        """Forget what was said; the system text stays."""
        self.turns, self.prompt, self.reply, self.replies = [], [], None, {}

    def fit(self, turns: list[Message]) -> list[Message]:
        """The turns without the oldest questions and answers, as many as must go for an answer to have room.

        raises  UserError if the last question alone is too long
        """
        context = context_length(self.model)
        ids = self.render(self.tokenizer, self.style, turns, self.system)
        dropped = 0
        # Half of a small context is enough for an answer: else a long max_new_tokens would leave no history.
        while (
            context is not None
            and len(turns) > 1
            and len(ids) + min(self.max_new_tokens, context // 2) > context
        ):
            turns = turns[2:]
            dropped += 1
            ids = self.render(self.tokenizer, self.style, turns, self.system)
        allowances([ids], self.max_new_tokens, context)
        if dropped:
            what = (
                "question and its answer are"
                if dropped == 1
                else f"{dropped} questions and their answers are"
            )
            self.notice(f"the context of {context} tokens is full: the oldest {what} left out from here on")
        self.prompt = ids
        return turns

    def answer(self, turns: list[Message], *, base: bool) -> Generator[str, None, None]:
        """Answer the turns in a thread, and yield its text piece by piece."""
        ids = self.prompt = self.render(self.tokenizer, self.style, turns, self.system)
        pieces: queue.SimpleQueue[str | Answer | BaseException] = queue.SimpleQueue()
        cancelled = threading.Event()
        text = TextStream(self.tokenizer)

        def on_token(_prompt: int, token: int) -> None:
            if cancelled.is_set():
                raise Cancelled
            if piece := text.push(token):
                pieces.put(piece)

        def work() -> None:
            try:
                pieces.put(self.run(ids, base=base, on_token=on_token))
            except BaseException as error:  # handed to the thread that reads, which raises it
                pieces.put(error)

        given = ""
        stopped = False
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while isinstance(piece := pieces.get(), str):
                given += piece
                yield piece
            if isinstance(piece, BaseException):
                raise piece
            stopped = piece.stopped
            if rest := text.rest():
                given += rest
                yield rest
        finally:
            cancelled.set()
            worker.join()
            self.reply = self.replies[base] = Reply(given, len(text.ids), stopped, base)

    def run(self, ids: list[int], *, base: bool, on_token: Callable[[int, int], None]) -> Answer:
        """One answer, from start to end."""
        with self.adapters.disabled() if base and self.adapters is not None else nullcontext():
            return generate(
                self.model,
                [ids],
                stop_ids=self.stop_ids,
                pad_id=self.pad_id,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=self.seed + len(self.turns),  # another question, other random numbers
                on_token=on_token,
            )[0]

    def shown_prompt(self) -> tuple[list[int], str]:
        """The last prompt as the model got it: its ids, and their text with special tokens.

        raises  UserError if nothing was asked yet
        """
        if not self.prompt:
            raise UserError("no prompt was made yet", hint="ask something first")
        return self.prompt, str(self.tokenizer.decode(self.prompt, clean_up_tokenization_spaces=False))


class TextStream:
    """Tokens to pieces of text; bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.ids, self.sent = tokenizer, list[int](), 0

    def push(self, token: int) -> str:
        """The text that a token adds and that is certain by now."""
        self.ids.append(token)
        # An unfinished character decodes to U+FFFD. Decoding everything again is exact, and cheap beside a model.
        return self.take(self.text().rstrip("\N{REPLACEMENT CHARACTER}"))

    def rest(self) -> str:
        """What waited in vain for the end of a character."""
        return self.take(self.text())

    def text(self) -> str:
        return str(
            self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def take(self, text: str) -> str:
        piece = text[self.sent :]
        self.sent = max(self.sent, len(text))
        return piece
