"""Tables of the docs from what was measured: benchmarks/results/*.json between marks in docs/*.md.

<!-- table: NAME -->  ...  <!-- end -->       NAME is a function below
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loraloom.adapt import Adapters
from loraloom.adapter import AdapterSpec
from loraloom.optim8 import state_bytes
from loraloom.shapes import published
from loraloom.skeleton import meta_model
from loraloom.trace import Shapes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *sources: Any) -> str:
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    for one in sources:
        versions = ", ".join(f"{key} {value}" for key, value in one["versions"].items() if key != "loraloom")
        lines += ["", f"{one['machine']}; {versions}; commit {one['commit'][:7]}; `{plain(one['command'])}`"]
    return "\n".join(lines)


def plain(command: str) -> str:
    """A command without the folder that its result was written to, and the commit that is named beside it."""
    return re.sub(r" --(out|commit) \S+", "", command)


def article2() -> str:
    fitted, small = read("article2"), read("article2_2048")
    rows = []
    for name, row in fitted["results"].items():
        other = small["results"][name]
        published = fitted["published_seconds_and_gb_on_an_a100"].get(name)
        rows.append(
            [
                name.replace("double", "double quantisation"),
                f"{row['micro_tokens']:,}",
                f"{row['seconds_a_step']:.2f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['peak_gb']:.1f}",
                f"{other['seconds_a_step']:.2f}",
                f"{other['tokens_per_s']:,.0f}",
                f"{other['peak_gb']:.2f}",
                f"{row['loss'][-1]:.3f}",
                f"{published[1]:.2f}" if published else "",
            ]
        )
    head = ["base", "tokens a pass, as fitted", "s a step", "tokens/s", "peak GB", "s a step at 2,048 a pass"]
    head += ["tokens/s", "peak GB", "loss, step 5", "article 2: GB (A100, 1 sample a pass)"]
    return table(head, rows, fitted, small)


def large() -> str:
    records = [read(f"large_{name}") for name in ("llama-65b", "llama2-70b", "llama3-70b")]
    rows = []
    for one in records:
        row = one["results"]["nf4, double"]
        shape = re.search(r"--shape (\S+)", one["command"])
        rows.append(
            [
                shape[1] if shape else "?",
                f"{row['weights_gb']:.1f}",
                f"{row['predicted_gb']:.1f}",
                f"{row['peak_gb']:.1f}",
                f"{row['seconds_a_step']:.2f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['seconds_to_make_the_model']:.1f}",
            ]
        )
    head = [
        "shape",
        "weights GB",
        "planned peak GB",
        "measured peak GB",
        "s a step",
        "tokens/s",
        "s to make and quantise",
    ]
    return table(head, rows, *records)


def plan_peak() -> str:
    record = read("plan_peak")
    machine = record["machine"]
    rows = [
        [
            one["setting"],
            "held out" if one["frozen"] else "",
            f"{one['predicted'] / 1e9:.2f}",
            f"{one['measured'] / 1e9:.2f}",
            f"{100 * one['error']:+.2f} %",
        ]
        for one in record["settings"]
    ]
    about = f"{machine['gpu']}; torch {machine['torch']}; transformers {machine['transformers']}; "
    text = table(["setting", "", "planned GB", "measured GB", "apart"], rows)
    return f"{text}\n\n{about}commit {record['commit'][:7]}; `{plain(record['command'])}`"


def quality() -> str:
    record = read("qlora_quality")
    rows = []
    for base, found in record["table"].items():
        exact, loss, before = found["exact_match_tuned"], found["loss_tuned"], found["loss_base"]
        runs = [run for run in record["runs"] if run["base"] == base]
        rows.append(
            [
                base.replace("double", "double quantisation"),
                f"{before['mean']:.3f}",
                f"{loss['mean']:.3f}",
                f"{loss['lowest']:.3f} to {loss['highest']:.3f}",
                f"{exact['mean']:.3f}",
                " ".join(
                    f"{run['exact_match_tuned']:.3f}" for run in sorted(runs, key=lambda run: run["seed"])
                ),
            ]
        )
    head = ["base", "loss before", "after", "over seeds", "exact match", "by seed"]
    return table(head, rows, record)


def optimizers() -> str:
    """Counted on the shapes; no weight is there."""
    rows = []
    for r, targets in ((8, ["q", "v"]), (16, ["all-linear"]), (256, ["all-linear", "head"])):
        model = meta_model(published("llama2-7b"), dtype=torch.bfloat16)
        with torch.device("meta"), Shapes():
            adapters = Adapters(model)
            adapters.add("default", AdapterSpec(r=r, target_modules=targets))
        sizes = [p.numel() for p in adapters.parameters()]
        states = [sum(state_bytes(name, n) for n in sizes) for name in ("adamw", "sgd", "adamw8bit")]
        row = [f"r = {r} on {', '.join(targets)}", f"{sum(sizes):,}"]
        row += [f"{size / 1e6:,.1f}" for size in states]
        rows.append([*row, f"{(states[0] - states[1]) / 1e6:,.1f}"])
    head = ["Llama-2-7B", "trained", "AdamW MB", "SGD with momentum MB", "8-bit AdamW MB", "SGD saves MB"]
    return table(head, rows)


def kernels() -> str:
    record = read("quant4_kernels")
    speeds = [[name, f"{row['ms']:.3f}", f"{row['tb_per_s']:.2f}"] for name, row in record["speeds"].items()]
    return table(["28672 x 8192 weights", "ms", "TB/s"], speeds, record)


def bits() -> str:
    record = read("quant4_kernels")
    rows = [
        [name, f"{row['weights']:,}", *(str(row[key]) for key in ("bytes", "scales", "numbers"))]
        for name, row in record["differ"].items()
    ]
    return table(["", "weights", "bytes that differ", "8-bit scales", "dequantised numbers"], rows, record)


TABLES: dict[str, Callable[[], str]] = {
    "article2": article2,
    "large": large,
    "plan_peak": plan_peak,
    "quality": quality,
    "kernels": kernels,
    "bits": bits,
    "optimizers": optimizers,
}


def filled(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """A page with every table between its marks written anew."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{tables[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", block, text, flags=re.DOTALL)
