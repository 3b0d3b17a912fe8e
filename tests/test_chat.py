"""Conversations and the chat around them, on a tiny model with a byte-level tokenizer."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from rich.console import Console
from tiny_models import CONTEXT, END, PAD, FakeAdapters, byte_tokenizer, causal

from loraloom.chat import ask_once, loop, read_message
from loraloom.conversation import Conversation, Message, TextStream
from loraloom.data import Style, end_tokens, render_prompt
from loraloom.errors import UserError
from loraloom.generate import generate

TOKENIZER = byte_tokenizer()
STOPS = [END, *range(20)]


def render(tokenizer: Any, style: Any, turns: Sequence[Message], system: str | None, /) -> list[int]:
    text = f"{system}\n" if system else ""
    text += "".join(f"{turn['role'][0]}:{turn['content']}\n" for turn in turns)
    return tokenizer.encode(text + "a:")


def conversation(scale: float = 2.0, **arguments: Any) -> Conversation:
    model = causal()
    settings: dict[str, Any] = {"render": render, "stop_ids": STOPS, "pad_id": PAD, "max_new_tokens": 8}
    return Conversation(model, TOKENIZER, FakeAdapters(model, scale=scale), "plain", **settings | arguments)


def alone(chat: Conversation, turns: list[Message], *, base: bool, system: str | None = None) -> str:
    """The answer without any of the streaming."""
    ids = render(TOKENIZER, "plain", turns, system)
    chat.adapters.use(None if base else "a")  # type: ignore[union-attr]
    (answer,) = generate(chat.model, [ids], stop_ids=STOPS, pad_id=PAD, max_new_tokens=8)
    chat.adapters.use("a")  # type: ignore[union-attr]
    return TOKENIZER.decode(answer.ids, skip_special_tokens=True)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def script(lines: Sequence[str | type[BaseException]]) -> Callable[[str], str]:
    """An `input` that gives these lines, raising those that are exceptions, and then ends."""
    left = iter(lines)

    def read(_prompt: str) -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def talk(chat: Conversation, *lines: str | type[BaseException]) -> str:
    """What the chat prints for these lines."""
    console = Console(file=io.StringIO(), width=200)
    assert loop(chat, console, script(lines), waiting=lambda: False) == 0
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_answers_are_streamed_and_remembered() -> None:
    chat = conversation()
    first = "".join(chat.ask("hello"))
    assert first == alone(chat, [user("hello")], base=False)
    assert chat.turns == [user("hello"), {"role": "assistant", "content": first}]
    assert chat.reply is not None
    assert chat.reply.text == first
    second = "".join(chat.ask("and?"))
    assert second == alone(chat, [*chat.turns[:2], user("and?")], base=False)
    assert chat.prompt == render(TOKENIZER, "plain", chat.turns[:3], None)
    chat.reset()
    assert "".join(chat.ask("hello")) == first


def test_base_switches_the_adapter_off() -> None:
    chat = conversation()
    expected = {base: alone(chat, [user("hello")], base=base) for base in (True, False)}
    assert expected[True] != expected[False]
    chat.base = True
    assert "".join(chat.ask("hello")) == expected[True]
    chat.reset()
    chat.base = False
    assert "".join(chat.ask("hello")) == expected[False]


def test_compare_gives_both_and_goes_on_with_the_active_one() -> None:
    chat = conversation()
    pieces = list(chat.compare("hello"))
    for base in (True, False):
        text = "".join(piece for side, piece in pieces if side is base)
        assert text == alone(chat, [user("hello")], base=base) == chat.replies[base].text
    assert chat.reply == chat.replies[False]
    assert chat.turns[-1]["content"] == chat.replies[False].text


def test_a_reader_that_stops_keeps_what_was_given() -> None:
    chat = conversation(stop_ids=[], max_new_tokens=60)
    threads = threading.active_count()
    pieces = chat.ask("hello")
    given = next(pieces) + next(pieces)
    pieces.close()
    assert chat.turns == [user("hello"), {"role": "assistant", "content": given}]
    assert chat.reply is not None
    assert not chat.reply.stopped
    assert chat.reply.tokens < 60  # generation ended with the reader
    assert threading.active_count() == threads
    assert "".join(chat.ask("more"))  # and the model is as it was


def test_an_error_in_the_model_reaches_the_reader() -> None:
    chat = conversation()

    def fail(*_arguments: Any, **_named: Any) -> None:
        raise RuntimeError("broken")

    chat.model.generate = fail
    with pytest.raises(RuntimeError, match="broken"):
        list(chat.ask("hello"))
    assert chat.turns == []


def test_a_full_context_drops_the_oldest_turns() -> None:
    notices: list[str] = []
    chat = conversation(notice=notices.append)
    for number in range(8):
        list(chat.ask(f"question number {number}"))
        assert len(chat.prompt) + 8 <= CONTEXT
    assert chat.turns[-2] == user("question number 7")
    assert chat.turns[0]["role"] == "user"
    assert chat.turns[0] != user("question number 0")
    assert "the context of 96 tokens is full" in notices[0]
    before = list(chat.turns)
    with pytest.raises(UserError, match="the model takes 96 tokens"):
        list(chat.ask("x" * CONTEXT))
    assert chat.turns == before


def test_characters_are_whole() -> None:
    text = "naïve €5 \N{GRINNING FACE} ok"
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token) for token in TOKENIZER.encode(text)]
    assert "".join(pieces) + stream.rest() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "\N{EURO SIGN}" in pieces  # in one piece, though it is three tokens
    assert pieces.count("") == 1 + 2 + 3
    broken = TextStream(TOKENIZER)
    assert [broken.push(0xE2), broken.push(0x82)] == ["", ""]
    assert broken.rest() == "\N{REPLACEMENT CHARACTER}"
    assert broken.push(ord("a")) == "a"


def test_the_same_prompt_as_training() -> None:
    """With the real renderer of the data pipeline."""
    style = Style("alpaca")
    chat = conversation(render=render_prompt, stop_ids=end_tokens(TOKENIZER, style))
    chat.style = style
    chat.model.config.max_position_embeddings = 4096
    list(chat.ask("Say it."))
    assert chat.prompt == render_prompt(TOKENIZER, style, "Say it.")
    assert "### Instruction:\nSay it." in chat.shown_prompt()[1]


def test_the_loop_answers_until_the_end() -> None:
    chat = conversation()
    out = talk(chat, "hello", "", "   ")
    assert alone(chat, [user("hello")], base=False) in out
    assert len(chat.turns) == 2  # empty lines ask nothing


@pytest.mark.parametrize("end", ["/quit", EOFError, KeyboardInterrupt])
def test_ways_to_leave(end: str | type[BaseException]) -> None:
    chat = conversation()
    talk(chat, end, "hello")
    assert chat.turns == []


def test_commands() -> None:
    chat = conversation()
    out = talk(
        chat,
        "/help",
        "/base",
        "hello",
        "/base",
        "/system be kind",
        "more",
        "/show-prompt",
        "/system",
        "/system off",
    )
    for command in ("/compare", "/reset", "/system", "/show-prompt", "/quit"):
        assert command in out
    assert "base answers from here on" in out
    assert "tuned answers from here on" in out
    assert str(chat.prompt) in out
    assert "be kind\nu:hello" in out
    assert "system: be kind" in out
    assert "no system text" in out
    assert chat.system is None
    assert chat.turns[1]["content"] == alone(chat, [user("hello")], base=True)
    assert chat.turns[3]["content"] == alone(chat, chat.turns[:3], base=False, system="be kind")
    talk(chat, "/reset")
    assert chat.turns == []


def test_compare_in_the_loop() -> None:
    chat = conversation()
    out = talk(chat, "/compare hello")
    assert out.index("base\n") < out.rindex("tuned\n")
    assert len(chat.turns) == 2
    again = talk(chat, "/compare")
    assert len(chat.turns) == 2  # the same question again, not a second one
    assert out.split("leaves.")[1] == again.split("leaves.")[1]


def test_mistakes_are_said_and_the_chat_goes_on() -> None:
    chat = conversation()
    out = talk(chat, "/cmopare x", "/show-prompt", "/compare", "x" * 200, "hello")
    assert "there is no command /cmopare" in out
    assert "/compare" in out
    assert "no prompt was made yet" in out
    assert "nothing was asked yet" in out
    assert "the model takes 96 tokens" in out
    assert len(chat.turns) == 2


def test_a_slash_behind_a_space_is_text() -> None:
    chat = conversation()
    talk(chat, " /etc/passwd")
    assert chat.turns[0] == user("/etc/passwd")


def test_ctrl_c_ends_the_answer_and_not_the_chat() -> None:
    chat = conversation(stop_ids=[], max_new_tokens=50)

    class Interrupting(io.StringIO):
        def flush(self) -> None:
            answer = self.getvalue().partition("leaves.\n")[2]
            if answer and "Ctrl-C" not in answer:
                raise KeyboardInterrupt

    console = Console(file=Interrupting(), width=200)
    assert loop(chat, console, script(["hello", "more"]), waiting=lambda: False) == 0
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "ended by Ctrl-C" in out
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2


def test_a_signal_ends_a_slow_answer() -> None:
    """Ctrl-C while the model works and nothing is there to read."""
    chat = conversation()

    def slow(ids: list[int], *, base: bool, on_token: Callable[[int, int], None]) -> Any:
        on_token(0, ord("x"))
        started.set()
        while True:
            time.sleep(0.01)
            on_token(0, 0xE2)  # never a whole character

    def interrupt() -> None:
        started.wait(10)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    started = threading.Event()
    chat.run = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=interrupt)
    thread.start()
    out = talk(chat, "hello")
    thread.join()
    assert "ended by Ctrl-C" in out
    assert chat.turns[-1]["content"] == "x"


def test_an_answer_that_was_cut_is_marked() -> None:
    assert "(cut after 4 tokens)" in talk(conversation(stop_ids=[], max_new_tokens=4), "hello")


def test_what_a_model_writes_cannot_steer_the_terminal() -> None:
    chat = conversation()
    text = "[bold]a[/bold]\x1b[2J\x07\x9b1m\tb\n"
    chat.answer = lambda turns, *, base: iter([text])  # type: ignore
    for terminal, expected in ((True, "[bold]a[/bold]␛[2J␇?1m\tb\n\n"), (False, text + "\n")):
        console = Console(file=io.StringIO(), width=20, force_terminal=terminal)
        ask_once(chat, "hello", console=console)
        assert console.file.getvalue() == expected  # type: ignore[attr-defined]


def test_messages_of_several_lines() -> None:
    ready = iter([True, True, False])
    assert read_message(script(["a", "b", "c"]), lambda: next(ready)) == "a\nb\nc"
    assert read_message(script(['"""', "a", "", "b", '"""']), lambda: False) == "a\n\nb"
    with pytest.raises(EOFError):
        read_message(script(['"""', "a"]), lambda: False)


def test_ask_once_prints_text() -> None:
    chat = conversation()
    console = Console(file=io.StringIO(), width=200)
    ask_once(chat, "hello", console=console)
    assert console.file.getvalue() == chat.turns[1]["content"] + "\n"  # type: ignore[attr-defined]


def test_ask_once_prints_json() -> None:
    chat = conversation()

    def answer(**arguments: Any) -> Any:
        console = Console(file=io.StringIO(), width=20)  # nothing may be wrapped
        ask_once(chat, "hello", console=console, as_json=True, **arguments)
        return json.loads(console.file.getvalue())  # type: ignore[attr-defined]

    tuned = alone(chat, [user("hello")], base=False)
    one = answer()
    assert one.keys() == {"prompt", "tuned"}
    assert one["tuned"]["answer"] == tuned
    assert isinstance(one["tuned"]["stopped"], bool)
    chat.reset()
    both = answer(compare=True)
    assert both["prompt"] == "hello"
    assert both["tuned"] == one["tuned"]
    assert both["base"]["answer"] == alone(chat, [user("hello")], base=True)


def test_sampling_differs_between_questions_and_repeats_with_the_seed() -> None:
    def said() -> list[str]:
        chat = conversation(temperature=1.0, seed=5, stop_ids=[])
        return ["".join(chat.ask(text)) for text in ("hello", "hello")]

    assert said() == said()
