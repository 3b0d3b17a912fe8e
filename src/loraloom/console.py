"""What the command line shows: errors, tables, progress. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from .errors import UserError
from .progress import err
from .wording import percent

out = Console(highlight=False, soft_wrap=True)
WORDS = {"done": "Done", "stopped_early": "Stopped early", "interrupted": "Interrupted", "failed": "Failed"}


def quiet_in_ci() -> bool:
    """Whether only plain lines should be written: in CI, or where stderr is no terminal."""
    return bool(os.environ.get("CI")) or not sys.stderr.isatty()


def show_error(error: UserError) -> None:
    """An error in the user's words: what, where, how to fix it."""
    err.print(Text("error: ", style="bold red") + Text(error.message))
    for line in error.details:
        err.print(Text(f"  {line}"))
    if error.hint:
        err.print(Text("\nhint: ", style="bold") + Text(error.hint))


class TrainView:
    """A listener that shows a training run: its facts once, a bar while it runs, each evaluation on a line.

    every  in CI and logs, where there is no bar: a line each so many steps
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet, self.plain = quiet, quiet_in_ci()
        self.bar: Progress | None = None
        self.task: Any = None
        self.steps = 0
        self.best: float | None = None

    def __call__(self, kind: str, record: Any) -> None:
        if not self.quiet:
            getattr(self, f"on_{kind}", lambda record: None)(record)

    def on_fact(self, fact: tuple[str, str]) -> None:
        """One of the first lines, as soon as it is known."""
        name, text = fact
        err.print(Text(f" {name:<10}", style="bold") + Text(text))

    def on_workshop(self, shop: Any) -> None:
        """Once, before the first step: the rest of what will be done, with the reasons."""
        self.steps = len(shop.plan)
        for fact in facts(shop):
            self.on_fact(fact)
        if not self.plain:
            columns = (TextColumn(" step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[now]}"), console=err, transient=True)
            self.task = self.bar.add_task("train", total=self.steps, now="")
            self.bar.start()

    def on_step(self, record: dict[str, Any]) -> None:
        speed = record["tokens"] / max(record["seconds"], 1e-9)
        now = f"loss {record['loss']:.3f}  lr {record['lr']:.1e}  {speed:,.0f} tok/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=record["step"], now=now)
        elif record["step"] % max(1, self.steps // 10) == 0:
            err.print(f" step {record['step']}/{self.steps}  {now}")

    def on_eval(self, record: dict[str, Any]) -> None:
        metric = record.get("metric", "loss")
        lost = record["loss"] if metric == "loss" else -record[metric]
        better = self.best is None or lost < self.best
        self.best = lost if better else self.best
        if self.bar is not None:
            self.bar.refresh()
        mark = "best so far" if better and record["step"] else "" if record["step"] else "the base"
        if "base" in record:
            mark = f"before the first step; the base {record['base']:.4f}"
        if "metric" in record and not record["step"]:
            mark = "the head as it was drawn"
        also = "" if metric == "loss" else f", {metric} {record[metric]:.4f}"
        err.print(
            f" eval at step {record['step']}: held-out loss {record['loss']:.4f}{also}  {mark}".rstrip()
        )

    def on_note(self, words: str) -> None:
        err.print(Text(f"     note  {words}", style="dim"))

    def on_sample(self, record: dict[str, Any]) -> None:
        prompt, answer = (" ".join(str(record[key]).split()) for key in ("prompt", "answer"))
        prompt = "…" + prompt[-59:] if len(prompt) > 60 else prompt  # a prompt's end says what was asked
        answer = answer[:69] + "…" if len(answer) > 70 else answer
        ended = "" if record["stopped"] else "  (cut)"
        err.print(Text(f"   sample  {prompt} → {visible(answer) or '(nothing)'}{ended}", style="dim"))

    def on_end(self, status: str) -> None:
        if self.bar is not None:
            self.bar.stop()


def facts(shop: Any) -> list[tuple[str, str]]:
    """The lines that a run begins with, behind those that `opening` told while it was made."""
    train = shop.config.train
    batch = f"{train.batch_tokens} tokens" if train.batch_tokens else f"{train.batch_size} examples"
    kept = [shop.loaded.quantised or "dense", *filter(None, [shop.loaded.products])]
    return [
        (
            "step",
            f"{batch} in passes of {train.micro_tokens} tokens{', packed' if shop.packing else ''}; "
            f"{len(shop.plan)} steps, {train.optimizer} {train.learning_rate:g}, {train.schedule}",
        ),
        ("base", f"{', '.join(kept)}; every weight is frozen, its own dropout is off"),
        *shop.execution.items(),
        *(("note", text) for text in shop.loaded.notes),
    ]


def show_run(run: Any) -> None:
    """The end of a run in a few lines, and what to do next."""
    state = run.state
    checks = run.checks()
    passed = sum(check["ok"] for check in checks)
    best = state.get("best") or {}
    loss = f" · best held-out loss {best['loss']:.4f} at step {best['step']}" if best else ""
    base = f" (base {state['base_loss']:.4f})" if state.get("base_loss") is not None else ""
    err.print(
        f" {WORDS.get(state['status'], state['status'])} in {clock(state['seconds'])}{loss}{base}"
        f" · {passed} of {len(checks)} checks passed"
    )
    for check in checks:
        if not check["ok"]:
            err.print(Text(f"   check  {check['name']}: {check['detail']}", style="yellow"))
    err.print(f" Adapter  {run.adapter_path}")
    if (run.path / "report.html").is_file():
        err.print(f" Report   {run.path / 'report.html'}")
    verbs = [f"loraloom eval {run.path}"]
    verbs += [f"loraloom chat {run.path}"] if run.config.task == "causal" else []
    verbs += [f"loraloom merge {run.path} OUT"] if state.get("mergeable", True) else []
    err.print(f" Next     {'  ·  '.join(verbs)}")


def show_merge(result: Any) -> None:
    """What a merge kept of the update, the worst layers first, and its verification."""
    from . import verify

    merged = result.merged
    out.print(Text(f"Merged into {merged.folder}"))
    sums = f"{len(merged.layers)} layers on the {merged.base} base" if merged.layers else "no layer"
    whole = f", {len(merged.replaced)} parameters that were trained whole" if merged.replaced else ""
    parted = "; the head and the embedding, one tensor in the base, are two now" if merged.untied else ""
    out.print(Text(f" {sums}{whole}, saved in {merged.dtype}{parted}"))
    for note in merged.notes:
        out.print(Text(f" note  {note}"))
    if merged.layers:
        rows = [*worst(merged.layers), ("all", None, merged.total("error"), merged.total("rounding"))]
        width = max(len(name) for name, *_ in rows)
        head = (
            f" {'of the update lost, worst first':<{width}}  {'update/W':>9}  {'error':>9}  {'rounding':>9}"
        )
        out.print(Text(head, style="dim"))
        for name, *shares in rows:
            out.print(Text(f" {name:<{width}}" + "".join(f"  {as_share(value):>9}" for value in shares)))
    if merged.hint:
        out.print(Text(f" {merged.hint}", style="yellow"))
    if result.verification is None:
        out.print(Text(f" not verified: {result.skipped}", style="yellow"))
        return
    verify.render(result.verification, out)
    if (known := result.trained) is not None:
        agree = f"top-1 agree {as_share(known.top1_agreement)}, mean KL {known.mean_kl:.2g}"
        out.print(Text(f" against the adapter on the quantised base of its training (not judged): {agree}"))


def worst(layers: Any, count: int = 5) -> list[tuple[str, float | None, float, float]]:
    """The layers that lost the largest share of their update."""
    order = sorted((row for row in layers if row.error), key=lambda row: -row.error)
    return [(row.name, row.share, row.error, row.rounding) for row in order[:count]]


def as_share(value: float | None) -> str:
    return "" if value is None else percent(value)


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def fields(values: dict[str, Any], as_json: bool) -> dict[str, Any] | None:
    """Names and values for people, a line each; the values themselves for --json."""
    if as_json:
        return values
    width = max(len(name) for name in values)
    for name, value in values.items():
        if value not in (None, [], "", ()):
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            shown = "; ".join(map(str, value)) if isinstance(value, list | tuple) else shown
            out.print(Text(f" {name.replace('_', ' '):<{width}}  ", style="bold") + Text(str(shown)))
    return None


def show_plan(plan: dict[str, Any]) -> None:
    """A plan: what is run, memory by part with full fine-tuning beside it, what fits, disk, steps."""
    facts = [
        (
            "model",
            f"{plan['model']}  {plan['kind']}, {plan['layers']} layers, {plan['parameters']:,} weights",
        ),
        ("method", f"{plan['method']}  r {plan['r']}  {plan['adapted']} layers, {share_of(plan)}"),
        ("pass", f"{plan['micro_tokens']:,} tokens: {plan['batch']}"),
        ("recompute", f"{plan['recompute']}: {plan['reason']}"),
    ]
    kept = plan["dtype"] if plan["quantize"] == "none" else f"linear layers in {plan['quantize']}"
    about = {"base": kept, "optimizer": plan["optimizer"], "adapters": "float32", "gradients": "float32"}
    about |= {"activations": "kept for the backward pass", "workspace": "in passing"}
    lines = [(part, size, about[part]) for part, size in plan["parts"].items()]
    lines += [("libraries", plan["peak"] - sum(plan["parts"].values()), "of torch")]
    lines += [("peak", plan["peak"], f"at: {plan['phase']}")]
    lines += [("on the GPU", plan["needed"], "with the driver's context and room for fragments")]
    show_facts(facts)
    show_sizes("memory", lines)
    show_sizes("on the GPU, by train.recompute", [tier_of(one) for one in plan["tiers"]])
    show_facts(
        [("fits", fits(plan))] if plan["gpu"] else [("fits", "no GPU here; name one's memory: --gpu 80GB")]
    )
    full, paper = plan["full"], plan["paper"]
    total = sum(full.values())
    beside = f"without activations; {paper['full'] / 1e12:g} TB in the {paper['source']}"
    show_sizes(
        "full fine-tuning", [*((part, size, "") for part, size in full.items()), ("in all", total, beside)]
    )
    disk = plan["disk"]
    show_facts(
        [
            (
                "disk",
                f"adapter {size(disk['adapter_16'])} in 16 bits, {size(disk['adapter'])} as written; checkpoint "
                f"{size(disk['checkpoint'])}; adapters and checkpoints of a run at most {size(disk['run'])}",
            ),
            ("steps", steps_of(plan["steps"])),
        ]
    )


def tier_of(row: dict[str, Any]) -> tuple[str, int, str]:
    """A recomputation: what a GPU must have free for it."""
    return row["recompute"], row["needed"] or 0, {True: "fits", False: "does not fit", None: ""}[row["fits"]]


def share_of(plan: dict[str, Any]) -> str:
    return f"{plan['trainable']:,} weights train ({plan['trainable'] / plan['parameters']:.3%})"


def fits(plan: dict[str, Any]) -> str:
    """Whether it does, and how large a pass would."""
    gpu = plan["gpu"]
    verdict = "yes" if plan["fits"] else "no"
    largest = f"the largest pass that does: {plan['largest']:,} tokens" if plan["largest"] else "no pass does"
    if plan["largest"] and plan["largest"] >= (plan["step_tokens"] or math.inf):
        largest = "so does a whole step in one pass"
    return f"{verdict}, into {gpu['bytes'] / 1e9:.1f} GB of {gpu['name']}; {largest}"


def steps_of(steps: dict[str, int] | None) -> str:
    if steps is None:
        return "unknown without data"
    return f"{steps['steps']:,} for {steps['examples']:,} examples of {steps['tokens']:,} tokens"


def show_facts(lines: list[tuple[str, str]]) -> None:
    for name, text in lines:
        out.print(Text(f" {name:<10}", style="bold") + Text(text))


def show_sizes(title: str, lines: list[tuple[str, int, str]]) -> None:
    """Rows of name, bytes and a remark; a part that takes nothing is left out."""
    out.print(Text(f" {title}", style="bold"))
    for name, count, remark in lines:
        if count:
            out.print(Text(f"   {name:<28} {size(count):>10}  ") + Text(remark, style="dim"))


def size(count: int) -> str:
    """Bytes in decimal units, as the papers count."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def show_runs(rows: list[dict[str, Any]]) -> None:
    """A table of runs, one a line, however wide it gets."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "run": lambda row: row["path"],
        "status": lambda row: row["status"].replace("_", " "),
        "model": lambda row: row["model"] or "",
        "method": lambda row: row["method"] or "",
        "steps": lambda row: f"{row['steps']:,}",
        "base loss": lambda row: number(row["base_loss"]),
        "best loss": lambda row: number(row["best_loss"]),
        "exact match": lambda row: "" if row["exact_match"] is None else f"{row['exact_match']:.1%}",
        "time": lambda row: "" if row["seconds"] is None else clock(row["seconds"]),
        "started": lambda row: "" if row["age"] is None else f"{span(row['age'])} ago",
    }
    table = [[visible(write(row)) for write in columns.values()] for row in rows]
    lines = [list(columns), *table]
    widths = [max(map(cell_len, column)) for column in zip(*lines)]
    for place, line in enumerate(lines):
        cells = [pad(text, width, left=at < 4) for at, (text, width) in enumerate(zip(line, widths))]
        out.print(Text("  ".join(cells).rstrip(), style="" if place else "dim"))


def pad(text: str, width: int, *, left: bool) -> str:
    space = " " * (width - cell_len(text))
    return text + space if left else space + text


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def span(seconds: float) -> str:
    """How long ago, in one unit: 40 s, 12 min, 5 h, 3 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def visible(text: str) -> str:
    """A text whose control characters are shown instead of obeyed: what a model writes may hold any."""
    return "".join(c if c.isprintable() else "�" for c in text)
