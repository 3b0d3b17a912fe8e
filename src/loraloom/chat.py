"""The chat in a terminal: what is typed goes to a conversation, what stands behind a / is a command.

Ctrl-C during an answer ends that answer; at the prompt it ends the chat, as does Ctrl-D. Several lines can
be pasted at once, or written between two lines of \"\"\".

source  tests/test_chat.py
"""

from __future__ import annotations

import contextlib
import importlib
import json
import select
import sys
from collections.abc import Callable, Generator

from rich.console import Console
from rich.text import Text

from .conversation import Conversation, Reply
from .errors import UserError, did_you_mean

PROMPT = "> "
BLOCK = '"""'  # a line of this begins and ends a message of several lines
HELP = {
    "/base": "switch between the base and the tuned model",
    "/compare TEXT": "answer with both; without TEXT, the last question again",
    "/reset": "forget what was said",
    "/system TEXT": "set the system text; without TEXT, show it; /system off removes it",
    "/show-prompt": "the exact ids and text of the last prompt",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does",
}
# What a model writes must not steer the terminal: control characters but tab and newline become visible.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | dict.fromkeys(
    range(127, 160), "?"
)


def loop(
    conversation: Conversation,
    console: Console,
    input: Callable[[str], str] = input,
    waiting: Callable[[], bool] | None = None,
) -> int:
    """Talk until the user leaves, and give the exit code 0.

    input    asks for a line, like the builtin; EOFError and KeyboardInterrupt end the chat
    waiting  whether more lines stand ready, as after a paste
    """
    with contextlib.suppress(ImportError):  # Windows has none; lines can then not be edited
        importlib.import_module("readline")
    conversation.notice = lambda line: console.print(Text(line, style="yellow"))
    console.print(f"[bold]{side(conversation.base)}[/bold]. /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = read_message(input, waiting or more_lines)
        except (EOFError, KeyboardInterrupt):
            console.print()
            return 0
        try:
            if not step(conversation, console, line):
                return 0
        except KeyboardInterrupt:
            console.print("\n[dim](ended by Ctrl-C)[/dim]")
        except UserError as error:
            console.print(Text(str(error), style="red"))


def step(conversation: Conversation, console: Console, line: str) -> bool:
    """Handle one message or command; False to leave."""
    if not line.strip():
        return True
    if not line.startswith("/") or "\n" in line:
        write(console, conversation.ask(line.strip()))
        note_cut(console, conversation.reply)
        return True
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    match command:
        case "/quit" | "/exit":
            return False
        case "/help":
            for name, what in HELP.items():
                console.print(Text(f"  {name:<15} {what}"))
            console.print(Text("  A message that begins with / needs a space before it."))
        case "/base":
            conversation.base = not conversation.base
            console.print(f"[bold]{side(conversation.base)}[/bold] answers from here on")
        case "/compare":
            compare_last(conversation, console, rest)
        case "/reset":
            conversation.reset()
            console.print("[dim]a new conversation[/dim]")
        case "/system":
            set_system(conversation, console, rest)
        case "/show-prompt":
            ids, text = conversation.shown_prompt()
            console.print(Text(f"{len(ids)} tokens: {ids}"))
            console.print(Text(text.translate(VISIBLE)))
        case _:
            names = [name.split()[0] for name in HELP]
            raise UserError(f"there is no command {command}", hint=did_you_mean(command, names))
    return True


def compare_last(conversation: Conversation, console: Console, text: str) -> None:
    """Answer a question with both models; without one, the last question again.

    raises  UserError if there is no question to repeat
    """
    if not text:
        asked = [i for i, turn in enumerate(conversation.turns) if turn["role"] == "user"]
        if not asked:
            raise UserError("nothing was asked yet", hint="write /compare and a question")
        text = conversation.turns[asked[-1]]["content"]
        conversation.turns = conversation.turns[: asked[-1]]
    write_both(conversation, console, text)
    note_cut(console, conversation.reply)


def write_both(conversation: Conversation, console: Console, text: str) -> None:
    """Print both answers, one below the other, each under its name."""
    shown: bool | None = None
    with contextlib.closing(conversation.compare(text)) as pieces:
        for base, piece in pieces:
            if base is not shown:
                console.print(f"{'' if shown is None else chr(10)}[bold]{side(base)}[/bold]")
                shown = base
            show(console, piece)
    console.print()


def set_system(conversation: Conversation, console: Console, text: str) -> None:
    """Set, show or remove the system text."""
    if text:
        conversation.system = None if text == "off" else text
    if conversation.system is None:
        console.print("[dim]no system text[/dim]")
    else:
        console.print(Text(f"system: {conversation.system}", style="dim"))


def ask_once(
    conversation: Conversation,
    text: str,
    *,
    console: Console | None = None,
    as_json: bool = False,
    compare: bool = False,
) -> None:
    """Answer one question on stdout, for scripts: as text while it comes, or as one JSON object at the end.

    The object has the prompt and "tuned" or "base", with compare both: {answer, stopped, tokens}.

    raises  UserError if the question does not fit into the model's context
    """
    console = console or Console()
    if as_json:
        for _ in conversation.compare(text) if compare else conversation.ask(text):
            pass
        sides = (True, False) if compare else (conversation.base,)
        answers = {side(base): facts(conversation.replies[base]) for base in sides}
        console.file.write(json.dumps({"prompt": text} | answers, ensure_ascii=False) + "\n")
    elif compare:
        write_both(conversation, console, text)
    else:
        write(console, conversation.ask(text))


def facts(reply: Reply) -> dict[str, str | int | bool]:
    return {"answer": reply.text, "stopped": reply.stopped, "tokens": reply.tokens}


def side(base: bool) -> str:
    """Whose answer it is."""
    return "base" if base else "tuned"


def write(console: Console, pieces: Generator[str, None, None]) -> None:
    """Print an answer while it comes, and end its line. What is printed by Ctrl-C stays in the conversation."""
    with contextlib.closing(pieces):
        for piece in pieces:
            show(console, piece)
    console.print()


def show(console: Console, piece: str) -> None:
    """A piece of an answer as it is: no markup, no line breaks of ours."""
    console.file.write(piece.translate(VISIBLE) if console.is_terminal else piece)
    console.file.flush()


def note_cut(console: Console, reply: Reply | None) -> None:
    """Say that an answer was cut for its length."""
    if reply is not None and not reply.stopped:
        console.print(f"[dim](cut after {reply.tokens} tokens)[/dim]")


def read_message(read: Callable[[str], str], waiting: Callable[[], bool]) -> str:
    """One message: a line, the lines that were pasted with it, or those between two lines of \"\"\".

    raises  EOFError and KeyboardInterrupt as `read` does
    """
    lines = [read(PROMPT)]
    if lines[0].strip() == BLOCK:
        while (line := read("")).strip() != BLOCK:
            lines.append(line)
        return "\n".join(lines[1:])
    while waiting():
        lines.append(read(""))
    return "\n".join(lines)


def more_lines() -> bool:
    """Whether the terminal already holds another line. Through a pipe every line is a message of its own."""
    if not sys.stdin.isatty() or sys.platform == "win32":
        return False
    return bool(select.select([sys.stdin], [], [], 0.02)[0])
