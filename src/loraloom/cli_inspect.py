"""The command `inspect`: what an adapter did to its base, layer by layer."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from . import console
from .errors import UserError
from .verbs import cli, model_option, offline_option, with_json
from .wording import number, percent

STYLES = {"good": "green", "warn": "yellow", "bad": "bold red", "even": "dim"}
LINES = 10  # layers that the terminal shows


@cli.command("inspect")
@click.argument("adapter")
@click.argument("other", required=False)
@model_option
@click.option("--layer", help="Decoder layer of the heat maps: a number, several with commas, or all.")
@click.option("-o", "--output", help="A folder for inspect.html, analysis.json and the figures.")
@click.option("--k", default=10, show_default=True, help="Singular vectors asked for intruders.")
@click.option("--epsilon", default=0.5, show_default=True, help="An intruder's largest cosine to W's.")
@click.option("--no-base", is_flag=True, help="Leave out what needs the base's weights.")
@offline_option
@with_json
def inspect(
    adapter: str,
    other: str | None,
    layer: str | None,
    output: str | None,
    no_base: bool,
    as_json: bool,
    **options: Any,
) -> Any:
    """Show what an adapter did to each weight, and how alike two adapters are.

    Of each layer: the update's spectrum and effective rank, its size beside W, amplification, intruder dimensions,
    what merging in 16 bits would lose. With OTHER: phi(i, j) of the two, beside random matrices.

    \b
    loraloom inspect runs/first -o out/inspect
    loraloom inspect runs/r8 runs/r64 --layer all --json

    ADAPTER and OTHER are runs or adapter folders, PEFT's too.
    """
    from . import inspection

    found = inspection.inspect(
        adapter, other, layers=layers_of(layer), base=not no_base, progress=not as_json, **options
    )
    written: list[Path] = []
    if output is not None:
        written = inspection.write_page(found, Path(output), shlex.join(["loraloom", *sys.argv[1:]]))
    if found["base"] and (Path(adapter) / "run.json").is_file():
        from . import api

        inspection.keep(found, Path(adapter))
        api.write_pages(api.Run.open(adapter))
    if output is not None:
        written.append(inspection.keep(found, Path(output)))
    if as_json:
        return found
    show(found)
    for path in written:
        console.err.print(Text(f" wrote {path}", style="dim"))
    return None


def layers_of(text: str | None) -> tuple[int, ...] | None:
    """None for the middle layer, () for all.

    raises  UserError for what is no list of numbers
    """
    if text is None:
        return None
    if text == "all":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--layer is {text!r}", hint="a number, several with commas, or all") from None


def show(found: Mapping[str, Any]) -> None:
    """The verdicts, a line for each kind of weight, the oddest layers, and phi."""
    from .inspect_page import kind_table, pair_table, worst_first

    about, other = found["adapter"], found["comparison"]
    beside = f" beside {other['with']['name']}" if other else ""
    console.out.print(Text(f"{about['name']}{beside}: {about['method']}, r = {about['r']}", style="bold"))
    for note in [*found["notes"], *(other["notes"] if other else ())]:
        console.out.print(Text(f" note  {note}", style="yellow"))
    for check in found["checks"]:
        words = f" {check['name']:<20} "
        console.out.print(Text(words, style=STYLES[check["level"]]) + Text(check["detail"]))
    if found["kinds"]:
        console.out.print()
        table = kind_table(found["kinds"])
        lines(table["columns"], table["rows"])
        console.out.print()
        rows = [layer_line(row) for row in worst_first(found["layers"])[:LINES]]
        head = ["oddest layers first", "‖ΔW‖", "‖ΔW‖/‖W‖", "effective rank", "amplification", "intruders"]
        lines([*head, "lost in bf16"], rows)
    if other:
        console.out.print()
        pairs = pair_table(found) or {"columns": [], "rows": []}
        lines(pairs["columns"], pairs["rows"])


def layer_line(row: Mapping[str, Any]) -> list[str]:
    state = "" if row["state"] == "learnt" else f" ({row['state']})"
    lost = ((row.get("rounding") or {}).get("bfloat16") or {}).get("error")
    return [
        row["name"] + state,
        number(row.get("norm"), 3),
        percent(row.get("ratio"), 3),
        number(row.get("effective_rank"), 3),
        number(row.get("amplification"), 3),
        number(row.get("intruders")),
        percent(lost, 3),
    ]


def lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: the first column to the left, numbers to the right."""
    widths = [max(len(str(line[at])) for line in [columns, *rows]) for at in range(len(columns))]
    for at, line in enumerate([columns, *rows]):
        cells = [f"{cell:<{w}}" if not n else f"{cell:>{w}}" for n, (cell, w) in enumerate(zip(line, widths))]
        console.out.print(Text(" " + "  ".join(cells), style="" if at else "dim"))
