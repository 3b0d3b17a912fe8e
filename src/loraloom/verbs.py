"""The command line's frame: the group that every verb joins, the options they share, and --json."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from . import __version__
from .errors import UserError


class Verbs(click.Group):
    """Commands in the order of work, and our errors printed bare."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        from .errors import did_you_mean

        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise UserError(f"there is no command {args[0]!r}", hint=did_you_mean(args[0], self.commands))
        return super().resolve_command(ctx, args)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="loraloom")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Fine-tune large language models by low-rank adaptation.

    \b
    loraloom train -m smollm2-135m-instruct -d examples.jsonl -o runs/first
    loraloom eval runs/first
    loraloom chat runs/first
    loraloom merge runs/first out/first
    """


def with_json(function: Callable[..., Any]) -> Callable[..., Any]:
    """A command that returns a value for --json, or has shown it itself and returns None or an exit code."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
    @wraps(function)
    def command(*args: Any, as_json: bool, **kwargs: Any) -> Any:
        value = function(*args, as_json=as_json, **kwargs)
        if isinstance(value, int):
            return value
        if as_json and value is not None:
            click.echo(json.dumps(value, ensure_ascii=False, default=str))
        return 0

    return command


offline_option = click.option("--offline", is_flag=True, help="Make no request at all.")
model_option = click.option("-m", "--model", help="The base: a folder or a Hugging Face id.")
