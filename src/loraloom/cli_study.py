"""`loraloom study`: list the studies, plan one, make one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from . import console
from .errors import Failure, UserError
from .study_table import cells, columns, published
from .verbs import cli, offline_option, with_json
from .wording import number, percent, plural


@cli.command()
@click.argument("name", required=False)
@click.option("--preset", help="One of the study's presets; without it the first.")
@click.option("--plan", "plan_only", is_flag=True, help="Say what each setting would take, and run nothing.")
@click.option("-o", "--output", help="The study's folder; runs/study-NAME-PRESET without it.")
@click.option("--retry", is_flag=True, help="Try runs again that failed.")
@offline_option
@click.option("-q", "--quiet", is_flag=True, help="Only the table.")
@with_json
def study(
    name: str | None,
    preset: str | None,
    plan_only: bool,
    output: str | None,
    retry: bool,
    offline: bool,
    quiet: bool,
    as_json: bool,
) -> Any:
    """Try settings over seeds, and read the answer on one page. NAME is a study that ships, or a YAML file.

    \b
    loraloom study                               what there is
    loraloom study rank                          on a small model, in minutes
    loraloom study rank --preset published --plan
    """
    from . import study_file

    if name is None:
        rows = study_file.listing()
        return rows if as_json else show_listing(rows)
    if name == "latency" and not Path(name).is_file():
        raise UserError("latency trains nothing, and is a command of its own", hint="loraloom latency")
    if plan_only:
        return show_plans(name, preset, offline, as_json)
    from .study import study as make

    view = StudyView(quiet=quiet or as_json)
    record = make(
        name, preset=preset, out=output, listen=view, offline=offline, retry=retry, quiet=quiet or as_json
    )
    if as_json:
        return record
    show_table(record)
    show_page(view.folder)
    return Failure.exit_code if any(row["failed"] for row in record["table"]) else None


class StudyView:
    """A line for each run as it begins and ends, on stderr."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet, self.folder = quiet, ""

    def __call__(self, kind: str, record: dict[str, Any]) -> None:
        if kind == "begin":
            self.folder = record["folder"]
        if not self.quiet:
            getattr(self, f"on_{kind}")(record)

    def on_begin(self, record: dict[str, Any]) -> None:
        found, statuses = record["study"], record["statuses"]
        preset = f", {found.preset}" if found.preset else ""
        console.err.print(Text(f" {found.name}{preset}", style="bold") + Text(f"  {found.file.asks}"))
        kept = statuses.count("finished")
        done = f", {kept} of them finished" if kept else ""
        console.err.print(f" {record['runs']} runs{done}, in {record['folder']}")

    def on_run(self, record: dict[str, Any]) -> None:
        console.err.print(f" {record['place']}/{record['of']}  {record['name']}, seed {record['seed']}")

    def on_ran(self, record: dict[str, Any]) -> None:
        if record["status"] != "finished":
            console.err.print(Text(f"      {record['status']}: {record['message']}", style="yellow"))
            return
        match, main = record["exact_match"], record["tasks"].get(record["main"])
        score = f"final loss {number(record['loss'])}"
        if main is not None:
            value = percent(main["value"]) if main["share"] else number(main["value"])
            score = f"final {record['main']} {value}"
        answers = f", exact match {match:.1%}" if match is not None else ""
        console.err.print(f"      {score}{answers}, {record['seconds']:.0f} s of steps")


def show_listing(rows: Sequence[dict[str, Any]]) -> None:
    """What each study asks, and what was published."""
    for row in rows:
        console.out.print(Text(f"{row['name']}", style="bold") + Text(f"  {row['asks']}"))
        console.out.print(Text(f"    {row['source']}: {row['found']}", style="dim"))
        console.out.print(Text(f"    presets: {', '.join(row['presets'])}", style="dim"))
    console.out.print(Text("latency", style="bold") + Text("  What do adapters cost in a forward pass?"))
    console.out.print(Text("    article 3, table 1; a command of its own: loraloom latency", style="dim"))


def show_plans(name: str, preset: str | None, offline: bool, as_json: bool) -> Any:
    """Each setting's counts, memory and steps."""
    from .study_file import read_study
    from .study_plan import plan_study

    found = read_study(name, preset)
    plans = plan_study(found, offline=offline)
    if as_json:
        return {"study": found.to_dict(), "plan": [one.to_dict() for one in plans]}
    lines = [["setting", "weights that train", "optimizer", "peak of a step", "steps", "published"]]
    for one in plans:
        memory = console.size(one.memory) if one.memory is not None else one.why
        checked = "=" if one.name in found.file.expected else ""
        steps = f"{one.steps:,}" if one.steps is not None else ""
        known = published(found.file.published.get(one.name, {}))
        counted = f"{one.trainable:,} {checked}".strip()
        lines.append([one.name, counted, console.size(one.state), memory, steps, known])
    show_lines(lines, left=(0, 5))
    counts = (len(found.settings), "setting"), (len(found.seeds), "seed")
    every = plural(len(found.settings) * len(found.seeds), "run")
    runs = f"{', '.join(plural(*count) for count in counts)}: {every}"
    only = f"; can only be planned: {found.file.plan_only}" if found.file.plan_only else ""
    console.out.print(Text(f"{runs}{only}", style="dim"))
    told = "= the count that the study expects; the peak is predicted for a GPU, without its context"
    if found.config(found.settings[0]).task == "classification":
        told = "= the count that the study expects, without the head, which trains too"
    console.out.print(Text(told, style="dim"))
    if found.file.note:
        console.out.print(Text(found.file.note, style="dim"))
    return None


def show_table(record: dict[str, Any]) -> None:
    """The table, and what it says."""
    rows = record["table"]
    head = columns(rows)
    words = [
        place for place, name in enumerate(head) if name in ("setting", "beside the chosen", "published")
    ]
    show_lines([head, *(cells(row, rows) for row in rows)], left=words)
    for sentence in record["says"]:
        console.out.print(Text(f" {sentence}"))
    told = "\N{PLUS-MINUS SIGN} one standard deviation over seeds; worse, better: Welch's test, p < 0.05"
    if record["study"]["preset"] == "small":
        told += "; published figures are of another model and data"
    console.out.print(Text(told, style="dim"))


def show_lines(lines: Sequence[Sequence[str]], *, left: Sequence[int]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines)]
    for place, line in enumerate(lines):
        padded = [
            console.pad(text, width, left=at in left) for at, (text, width) in enumerate(zip(line, widths))
        ]
        console.out.print(Text("  ".join(padded).rstrip(), style="" if place else "dim"))


def show_page(folder: str) -> None:
    page = Path(folder) / "study.html"
    if page.is_file():
        console.err.print(f" Page  {page}")


@cli.command()
@click.option(
    "--case", "cases", multiple=True, metavar="BxT", help="Batch x length, repeatable; as in the paper."
)
@click.option("--device", help="cpu or cuda; without it a GPU, if there is one.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="float32 on a CPU, else bfloat16."
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=100, show_default=True, help="Passes of each variant."
)
@click.option(
    "--clock",
    type=click.Choice(["wall", "cpu"]),
    default="wall",
    show_default=True,
    help="cpu: this process's time, of one thread, where other work goes on beside it.",
)
@click.option("-o", "--output", help="Also write the numbers to this JSON file.")
@with_json
def latency(
    cases: tuple[str, ...],
    device: str | None,
    dtype: str | None,
    rounds: int,
    clock: str,
    output: str | None,
    as_json: bool,
) -> Any:
    """Time a forward pass of GPT-2 medium: base, LoRA merged and not, bottleneck adapters (article 3, table 1)."""
    import shlex
    import sys

    from . import latency as timing
    from .files import write_json
    from .model import pick_device

    place = pick_device(device or "auto")
    sizes = cases or (("32x512", "16x256", "1x128") if place.type == "cuda" else ("1x128",))
    record = timing.measure(
        [timing.case_of(text) for text in sizes],
        device=place,
        dtype=dtype or ("bfloat16" if place.type == "cuda" else "float32"),
        rounds=rounds,
        clock=clock,
        told=(lambda row: None) if as_json else show_case,
    )
    record = {"command": shlex.join(["loraloom", *sys.argv[1:]])} | record
    if output:
        write_json(output, record)
    return record if as_json else show_machine(record)


def show_case(row: dict[str, Any]) -> None:
    """A case's table, and what it says."""
    from . import latency as timing

    show_lines([timing.COLUMNS, *timing.cells(row)], left=(0, 1))
    for sentence in row["says"]:
        console.out.print(Text(f" {sentence}"))


def show_machine(record: dict[str, Any]) -> None:
    threads = f", {plural(record['threads'], 'thread')}" if record["threads"] else ""
    facts = (
        f"{record['machine']}, {record['dtype']}{threads}; {record['rounds']} rounds, {record['clock']} time"
    )
    console.out.print(Text(facts, style="dim"))
