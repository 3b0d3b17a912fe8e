"""How a conversation is written for the model: one code path for training, chat and evaluation.

Three styles:

  chat    the tokenizer's own chat template
  alpaca  Stanford Alpaca's two texts, with and without an input; later turns leave out the preamble
  plain   the prompt as it is, then the answer as it is; a system text stands before it, a blank line between

A conversation becomes a `Script`: for each answer, what is written before it and the answer with its end
token. The loss mask is known from that, before anything is tokenised. With `chat` the pieces come from
rendering growing prefixes of the conversation, which works with every template that writes a turn the
same whether or not others follow it. One that does not is refused, unless only the last answer is trained.

source  tests/test_data.py; Alpaca's texts: github.com/tatsu-lab/stanford_alpaca, train.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .problems import around
from .turns import Conversation, Turn

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@dataclass(frozen=True)
class Style:
    """How prompts are written. Stored with the run, so that chat and evaluation write them the same."""

    name: str  # chat, alpaca or plain
    system: str | None = None  # for conversations that bring no system turn

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "system": self.system}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Style:
        return cls(str(value["name"]), value.get("system"))


@dataclass(frozen=True, slots=True)
class Part:
    """An answer and what is written before it since the last one."""

    before: str
    answer: str  # with the end token, if the template writes one
    end: str = ""  # the end token at the end of `answer`
    eos: bool = False  # the tokenizer's end token follows the answer, as a token


@dataclass(frozen=True, slots=True)
class Script:
    """A conversation as it will be tokenised. `prefix` stands for the tokenizer's own first tokens."""

    parts: tuple[Part, ...]
    tail: str = ""  # the prompt of an answer that is still to be generated
    prefix: bool = False


class Unsteady(Exception):
    """The template writes a turn otherwise once more turns follow: (earlier text, later text)."""


def resolve_style(prompt: str, system: str | None, tokenizer: Any, formats: Sequence[str]) -> Style:
    """The style for a data set.

    prompt   auto, chat, alpaca or plain
    formats  of the sources

    raises  DataError if the choice does not fit the rows or the tokenizer
    """
    turns = sorted({name for name in formats if name != "text"})
    if "text" in formats and prompt in ("chat", "alpaca"):
        raise DataError(
            f"data.prompt is {prompt}, and rows of plain text have no prompt",
            hint="--set data.prompt=auto, or map the columns to prompt and completion",
        )
    if prompt == "chat" and not tokenizer.chat_template:
        raise DataError(
            "data.prompt is chat, and the tokenizer has no chat template",
            hint="--set data.prompt=alpaca or plain, or take the model's chat (instruct) version",
        )
    if prompt != "auto":
        return Style(prompt, system)
    if not turns:
        return Style("plain", system)
    if tokenizer.chat_template:
        return Style("chat", system)
    if "alpaca" in turns and len(turns) > 1:
        raise DataError(
            f"the tokenizer has no chat template, and the formats {', '.join(turns)} suggest two styles",
            hint="choose one: --set data.prompt=alpaca or plain",
        )
    return Style("alpaca" if turns == ["alpaca"] else "plain", system)


class Writer:
    """Writes conversations in one style for one tokenizer."""

    def __init__(self, tokenizer: Any, style: Style) -> None:
        self.tokenizer = tokenizer
        self.style = style
        self.ends = end_pattern(tokenizer)

    def example(self, item: Conversation, *, every: bool) -> Script:
        """A conversation with its answers as a script.

        every  each answer must be found, not only the last

        raises  DataError if the template refuses the turns, or writes them so that no mask can be known
        """
        if item.document:
            return Script((Part("", item.turns[0].text, eos=True),), prefix=True)
        turns = with_system(item.turns, self.style.system)
        if self.style.name != "chat":
            return Script(tuple(plain_parts(self.style, turns)[0]), prefix=True)
        try:
            return Script(tuple(self.chat_parts(turns)[0]))
        except Unsteady as unsteady:
            if every:
                raise unsteady_error(item.where, *unsteady.args) from None
            return Script((self.last_part(turns, item.where),))
        except DataError as error:
            raise DataError(
                f"{item.where}: {error.message}", details=error.details, hint=error.hint
            ) from None

    def prompt(self, turns: Sequence[Turn]) -> Script:
        """The script up to the answer that follows `turns`: what training saw before that answer."""
        turns = with_system(turns, self.style.system)
        if self.style.name != "chat":
            parts, tail = plain_parts(self.style, turns)
            return Script(tuple(parts), tail, prefix=True)
        text = self.render(turns, generate=True)
        try:
            parts, done = self.chat_parts(turns)
        except Unsteady:
            return Script((), text)
        return Script(tuple(parts), text[len(done) :]) if text.startswith(done) else Script((), text)

    def chat_parts(self, turns: Sequence[Turn]) -> tuple[list[Part], str]:
        """The part of each answer, and all the text up to the last answer's end.

        raises  Unsteady if a prefix of the conversation is not a prefix of its text
        """
        parts: list[Part] = []
        done = ""
        for at, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self.render(turns[:at], generate=True)
            after = self.render(turns[: at + 1], generate=False)
            for earlier, later in ((done, before), (before, after)):
                if not later.startswith(earlier):
                    raise Unsteady(earlier, later)
            part = self.part(before[len(done) :], after[len(before) :], turn, last=at == len(turns) - 1)
            parts.append(part)
            done = before + part.answer
        return parts, done

    def last_part(self, turns: Sequence[Turn], where: str) -> Part:
        """The last answer alone; all that stands before it is its prompt."""
        before = self.render(turns[:-1], generate=True)
        after = self.render(turns, generate=False)
        if not after.startswith(before):
            raise unsteady_error(where, before, after)
        return self.part(before, after[len(before) :], turns[-1], last=True)

    def part(self, before: str, answer: str, turn: Turn, *, last: bool) -> Part:
        """Cut an answer behind its end token; what the template writes after that is never generated.

        A template that writes no end token would teach the model never to stop: the last answer then gets
        the tokenizer's own.
        """
        found = list(self.ends.finditer(answer))
        said = turn.text.strip()
        after = [end for end in found if answer[: end.start()].rstrip().endswith(said)] or found
        if after:
            return Part(before, answer[: after[-1].end()], end=after[-1].group())
        return Part(before, answer, eos=last and self.tokenizer.eos_token is not None)

    def render(self, turns: Sequence[Turn], *, generate: bool) -> str:
        """The chat template's text for some turns.

        raises  DataError with the template's own words if it refuses them
        """
        messages = [{"role": turn.role, "content": asked(turn)} for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate
            )
        except Exception as error:  # a template is foreign code
            roles = ", ".join(turn.role for turn in turns)
            raise DataError(
                f"the chat template refuses the turns ({roles}): {error}",
                hint="--set data.prompt=alpaca or plain writes prompts without the template",
            ) from None
        return str(text)


def with_system(turns: Sequence[Turn], system: str | None) -> list[Turn]:
    if system and not (turns and turns[0].role == "system"):
        return [Turn("system", system), *turns]
    return list(turns)


def plain_parts(style: Style, turns: Sequence[Turn]) -> tuple[list[Part], str]:
    """The parts of the styles `alpaca` and `plain`, and what is written after the last answer."""
    parts: list[Part] = []
    before, system = "", ""
    for turn in turns:
        if turn.role == "system":
            system = turn.text
        elif turn.role == "user":
            write_user = alpaca if style.name == "alpaca" else plain
            before += write_user(turn, system, first=not parts)
        else:
            parts.append(Part(before, turn.text, eos=True))
            before = ""
    return parts, before


def alpaca(turn: Turn, system: str, *, first: bool) -> str:
    """Alpaca's prompt; a system text takes the place of its preamble."""
    preamble = (system or (ALPACA_INPUT if turn.input else ALPACA)) + "\n\n" if first else ""
    given = f"### Input:\n{turn.input}\n\n" if turn.input else ""
    return f"{preamble}### Instruction:\n{turn.text}\n\n{given}### Response:"


def plain(turn: Turn, system: str, *, first: bool) -> str:
    return (f"{system}\n\n" if system and first else "") + asked(turn)


def asked(turn: Turn) -> str:
    """A user's words: an Alpaca row's instruction, a blank line and its input."""
    return f"{turn.text}\n\n{turn.input}" if turn.input else turn.text


def end_pattern(tokenizer: Any) -> re.Pattern[str]:
    """What matches any of the tokenizer's added tokens, such as <|im_end|>; blank ones are no ends."""
    names = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    words = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words)) or r"(?!)")


def unsteady_error(where: str, earlier: str, later: str) -> DataError:
    """Why no mask can be known, with the place where the texts part."""
    same = next(
        (at for at, (a, b) in enumerate(zip(earlier, later)) if a != b), min(len(earlier), len(later))
    )
    return DataError(
        f"{where}: the chat template is not prefix preserving: it writes a turn otherwise once more follows, "
        "so which tokens are answers cannot be known",
        details=[f"earlier: {around(earlier, same)}", f"later:   {around(later, same)}"],
        hint="--set data.loss_on=last_turn needs only the last answer; or --set data.prompt=plain or alpaca",
    )
