"""Prepared data for the eye: the counts, a histogram and rows with the trained tokens in colour."""

from __future__ import annotations

import random
from typing import Any

from rich.console import Console
from rich.text import Text

from .examples import IGNORED, Example
from .pipeline import Prepared
from .report import DataReport, SourceReport, length_histogram

SHOWN = 600  # characters of one piece in a preview
BROKEN = "\ufffd"  # what a decoder writes for part of a character


def preview(tokenizer: Any, example: Example) -> list[tuple[str, bool]]:
    """An example's text in pieces: (text, whether it carries loss).

    Each piece is what the text grows by, so that neither a blank at its start nor a character that several
    tokens share is lost; a character on the border belongs to the later piece.
    """
    pieces: list[tuple[str, bool]] = []
    written, start = "", 0
    for stop in range(1, len(example.ids) + 1):
        trained = example.labels[start] != IGNORED
        last = stop == len(example.ids)
        if not last and (example.labels[stop] != IGNORED) == trained:
            continue
        text = tokenizer.decode(
            example.ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text = text if last else text.rstrip(BROKEN)
        pieces.append((text[len(written) :], trained))
        written, start = text, stop
    return pieces


def show(prepared: Prepared, tokenizer: Any, console: Console, previews: int = 2, seed: int = 0) -> None:
    """Print the counts, a histogram of the lengths and some rows; what is trained is green."""
    report = prepared.report
    for source in report.sources:
        line(console, "Data", source_line(source))
        line(console, "Format", format_line(source))
    line(console, "Rows", rows_line(report))
    line(console, "Length", length_line(report))
    line(console, "Targets", targets_line(report))
    style = report.style["name"] + (f", system: {report.style['system']!r}" if report.style["system"] else "")
    line(console, "Prompt", f"style {style}")
    line(console, "Split", f"{report.train:,} training · {report.eval:,} validation examples")
    for note in report.notes:
        line(console, "Note", note)
    if len(prepared.train):
        title = "Tokens per training example"
        console.print(Text(f"\n{title}\n" + length_histogram(prepared.train.lengths.tolist())))
    chosen = random.Random(seed).sample(range(len(prepared.train)), min(previews, len(prepared.train)))
    for at in sorted(chosen):
        example = prepared.train[at]
        console.print(Text(f"\nPreview  {example.row}   grey = not trained, green = trained"))
        console.print(coloured(preview(tokenizer, example)))


def line(console: Console, name: str, text: str) -> None:
    console.print(Text.assemble((f"{name:<9}", "bold"), text))


def source_line(source: SourceReport) -> str:
    split = f" [{source.split}]" if source.split else ""
    repeat = f" · {source.repeat} times" if source.repeat > 1 else ""
    return f"{source.path}{split} · {source.use} · {source.read:,} rows, {source.kept:,} kept{repeat}"


def format_line(source: SourceReport) -> str:
    columns = ", ".join(f"{column} → {name}" for name, column in source.columns.items() if column != name)
    text = source.format + (f" · columns: {columns}" if columns else "")
    text += " (guessed; data.map to change)" if source.guessed else ""
    return text + (f" · not used: {', '.join(source.unused[:8])}" if source.unused else "")


def rows_line(report: DataReport) -> str:
    counts = [f"{problem.count:,} {problem.kind} ({problem.effect})" for problem in report.problems]
    cached = ["from the cache"] if report.cached else []
    return " · ".join([f"{report.read:,} read", f"{report.kept:,} kept", *counts, *cached])


def length_line(report: DataReport) -> str:
    lengths = report.lengths
    return (
        f"median {lengths['median']:,} · p99 {lengths['p99']:,} · max {lengths['max']:,} tokens "
        f"→ max_length {report.max_length:,} ({report.max_length_origin})"
    )


def targets_line(report: DataReport) -> str:
    what = {"completion": "completion only", "last_turn": "last answer only", "all": "all tokens"}[
        report.loss_on
    ]
    end = (
        f"every row ends in {report.end_token} (trained)"
        if report.all_ended
        else "some rows have no trained end"
    )
    return f"{report.target_share:.1%} of {report.tokens:,} tokens are trained ({what}) · {end}"


def coloured(pieces: list[tuple[str, bool]]) -> Text:
    """Trained text green, the rest grey; a long piece is shortened in the middle, which it says."""
    text = Text()
    for piece, trained in pieces:
        if len(piece) > SHOWN:
            cut = len(piece) - SHOWN
            piece = f"{piece[: SHOWN // 2]} [... {cut:,} characters ...] {piece[-SHOWN // 2 :]}"
        text.append(piece.replace("\n", "␤"), style="green" if trained else "bright_black")
    return text
