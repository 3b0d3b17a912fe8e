"""Scripts to token ids, so that training sees a prompt exactly as generation does.

A prompt is tokenised on its own, and the answer's tokens follow it. Where tokenising both together begins
with the prompt's tokens, the answer's are the rest. Where a token would cross the border (a prompt that
ends in a blank), there is no such token: the answer is tokenised apart, because at use the prompt's ids
stand before anything is generated. A piece that follows an end token is tokenised together with it, which
gives what tokenising the whole text gives, since special tokens always part a text.

source  tests/test_data.py::test_prompt_ids_are_those_of_generation
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ..errors import DataError
from .template import Script, Style, Writer
from .turns import Turn

ANCHORS = ("\n", ".", "0")  # texts that an answer may follow while it is tokenised apart


@dataclass(frozen=True, slots=True)
class Span:
    """An answer's tokens [start, stop), of which the last `end` are its end token."""

    start: int
    stop: int
    end: int


@dataclass(frozen=True, slots=True)
class Encoded:
    ids: list[int]
    spans: list[Span]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without the tokens that the tokenizer adds by itself."""
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = found["input_ids"]
    return ids


def first_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself, such as the BOS token."""
    bare, full = encode(tokenizer, ["a"])[0], list(tokenizer("a")["input_ids"])
    for place in range(len(full) - len(bare) + 1):
        if full[place : place + len(bare)] == bare:
            return full[:place]
    return []


def encode_scripts(tokenizer: Any, scripts: Sequence[Script]) -> list[Encoded]:
    """The ids of each script and where its answers stand in them.

    raises  DataError if a style needs the tokenizer's end token and it has none
    """
    eos = tokenizer.eos_token or ""
    cut = [pieces(script, eos) for script in scripts]
    texts: list[str] = []
    for anchor, before, answer in chain.from_iterable(cut):
        texts += [anchor + before, anchor + before + answer]
    ids = iter(encode(tokenizer, texts))
    prefix = first_tokens(tokenizer) if any(script.prefix for script in scripts) else []
    ends = any(part.eos for script in scripts for part in script.parts)
    end = end_id(tokenizer) if ends else -1  # asked for once: transformers takes microseconds to say it
    return [
        encode_script(tokenizer, script, its, prefix if script.prefix else [], end, ids)
        for script, its in zip(scripts, cut)
    ]


def pieces(script: Script, eos: str) -> list[tuple[str, str, str]]:
    """(what to tokenise before it, text before the answer, answer) of each part, then of the tail."""
    found, anchor = [], ""
    for part in script.parts:
        found.append((anchor, part.before, part.answer))
        anchor = part.end or (eos if part.eos else "")
    return [*found, (anchor, script.tail, "")] if script.tail else found


def encode_script(
    tokenizer: Any,
    script: Script,
    pieces: Sequence[tuple[str, str, str]],
    prefix: Sequence[int],
    end: int,
    texts: Iterator[list[int]],
) -> Encoded:
    """One script, from the ids of its pieces: two lists a piece. `end` is the tokenizer's end token."""
    ids, spans = list(prefix), []
    for number, (anchor, before, answer) in enumerate(pieces):
        short, long = next(texts), next(texts)
        if anchor:
            mark = tokenizer.convert_tokens_to_ids(anchor)
            if short[:1] == [mark] == long[:1]:
                short, long = short[1:], long[1:]
            else:
                short, long = encode(tokenizer, [before, before + answer])
        ids += short
        if number == len(script.parts):
            break
        part = script.parts[number]
        said = long[len(short) :] if long[: len(short)] == short else apart(tokenizer, answer)
        if part.eos:
            said = [*said, end]
        spans.append(Span(len(ids), len(ids) + len(said), int(bool(part.end) or part.eos)))
        ids += said
    return Encoded(ids, spans)


def apart(tokenizer: Any, answer: str) -> list[int]:
    """The ids of an answer tokenised on its own, without a blank that the tokenizer puts before any text."""
    alone, probe = encode(tokenizer, [answer, "a"])
    first = tokenizer.convert_ids_to_tokens(probe[:1])
    if not (first and first[0].startswith(("▁", "Ġ"))):
        return alone
    for anchor in ANCHORS:
        lead, both = encode(tokenizer, [anchor, anchor + answer])
        if both[: len(lead)] == lead:
            return both[len(lead) :]
    return alone


def end_id(tokenizer: Any) -> int:
    """The id of the tokenizer's end token.

    raises  DataError if it has none
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end token, so the model could not learn where an answer ends",
            hint="take a model whose tokenizer has an eos_token, or add one to its tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def render_prompt(
    tokenizer: Any, style: Style, turns: Sequence[Turn | Mapping[str, str]] | str, system: str | None = None
) -> list[int]:
    """The ids that stand before an answer: exactly those that training saw.

    turns   a question, or turns that end with the user's: Turn, or {"role", "content"}; an Alpaca row's
            second part is Turn.input or the key "input"
    system  instead of the style's own, if the turns bring none

    raises  DataError if the chat template refuses the turns
    """
    asked = [Turn("user", turns)] if isinstance(turns, str) else [as_turn(turn) for turn in turns]
    writer = Writer(tokenizer, Style(style.name, system if system is not None else style.system))
    return encode_scripts(tokenizer, [writer.prompt(asked)])[0].ids


def as_turn(turn: Turn | Mapping[str, str]) -> Turn:
    if isinstance(turn, Turn):
        return turn
    return Turn(turn["role"], turn["content"], turn.get("input", ""))


def end_tokens(tokenizer: Any, style: Style) -> list[int]:
    """The ids that end an answer in this style: the template's end token and the tokenizer's."""
    found = []
    if style.name == "chat":
        writer = Writer(tokenizer, style)
        parts, _ = writer.chat_parts([Turn("user", "a"), Turn("assistant", "b")])
        found = [int(tokenizer.convert_tokens_to_ids(part.end)) for part in parts if part.end]
    if tokenizer.eos_token_id is not None:
        found.append(int(tokenizer.eos_token_id))
    return list(dict.fromkeys(found))
