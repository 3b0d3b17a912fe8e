"""Tables of docs/methods.md: what each method is, from the code; what it costs and learns, from what was measured.

A benchmark that has no result yet leaves its columns empty, and says so below the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from tables import RESULTS, read, table
from transformers import AutoModelForCausalLM, LlamaConfig

from loraloom import methods
from loraloom.adapt import Adapters
from loraloom.adapter import AdapterSpec
from loraloom.adapter_files import ALONE, LORA, PEFT
from loraloom.incoming import quantize_model
from loraloom.peft_format import form_of
from loraloom.refusals import REFUSALS, UNMERGEABLE

COST, STUDY = "method_cost", "method_study"
LEVELS = (1.0, 0.5, 0.2, 0.1, 0.05)  # losses, nats a token
NOT_YET = "Not measured yet."
OPTIONS: dict[str, dict[str, Any]] = {"alora": {"invocation": (1,)}}


def measured(name: str) -> Any:
    return read(name) if (RESULTS / f"{name}.json").is_file() else None


# ---- what each method is ------------------------------------------------------------------------------------


def at_a_glance() -> str:
    """Every method; its cost where that was measured."""
    cost = measured(COST)
    rows = []
    for name in methods.names():
        kind = methods.find(name)
        method = methods.make(name, OPTIONS.get(name, {}))
        found = cost["methods"].get(name, {}) if cost else {}
        trained = found.get("trained_by_all_layers")
        rows.append(
            [
                f"`{name}`",
                f"{trained:,}" if trained else "",
                *(figure(found, base, "time_to_lora", ".2f") for base in ("bf16", "nf4")),
                *(figure(found, base, "gb_over_lora", "+.2f") for base in ("bf16", "nf4")),
                "yes" if method.mergeable else "no",
                in_4_bits(name),
                form(name),
                f"{kind.learning_rate:g}",
                kind.rate_source,
            ]
        )
    head = ["method", "trained, Llama-2-7B", "time of a step, bf16", "NF4", "GB over LoRA's, bf16", "NF4"]
    head += ["merges", "on 4 bits", "PEFT loads it", "default rate", "from"]
    text = table(head, rows, *([cost] if cost else []))
    return f"{text}\n\n{cost_notes(cost) if cost else NOT_YET}"


def figure(found: dict[str, Any], base: str, key: str, form: str) -> str:
    batches = found.get(base, {}).get("batches", {})
    first = next(iter(batches.values()), {})
    return format(first[key], form) if key in first else ""


def cost_notes(cost: Any) -> str:
    """What LoRA itself took, what was set apart from r = 16, and what failed."""
    lora = cost["methods"].get("lora", {})
    parts = []
    for base in ("bf16", "nf4"):
        for label, row in lora.get(base, {}).get("batches", {}).items():
            memory = f", {row['peak_gb']:.2f} GB above the weights" if "peak_gb" in row else ""
            parts.append(f"LoRA on {base}, {label} tokens: {1e3 * row['seconds']:.1f} ms{memory}.")
    parts += [f"`{name}`: {row['note']}." for name, row in cost["methods"].items() if row.get("note")]
    failed = [
        f"`{name}` on {base} failed: {row[base]['error']}."
        for name, row in cost["methods"].items()
        for base in ("bf16", "nf4")
        if "error" in row.get(base, {})
    ]
    return " ".join(parts + failed)


def in_4_bits(name: str) -> str:
    """Whether the refusals let it on a 4-bit base, and on a dense one."""
    against = {row.what for row in REFUSALS if name in row.methods}
    if "a base in 4 bits" in against:
        return "no"
    return "only there" if "a dense layer" in against else "yes"


@cache
def form(name: str) -> str:
    """The form of its files, of an adapter on a tiny model."""
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
    )
    model: Any = AutoModelForCausalLM.from_config(shape).requires_grad_(False)
    if in_4_bits(name) == "only there":
        quantize_model(model, "nf4")
    adapters = Adapters(model)
    spec = AdapterSpec(method=name, r=4, options=OPTIONS.get(name, {}))
    adapter = adapters.add("default", spec, blank=methods.make(name, OPTIONS.get(name, {})).needs is not None)
    with torch.no_grad():
        found = form_of(adapter)
    kind = str(adapter.method.peft_type)
    return {PEFT: f"as {kind}", LORA: "as a plain LoRA", ALONE: "no"}[found]


def refused() -> str:
    rows = [[named(row.methods), row.what, row.why, (row.hint or "").replace("|", "\\|")] for row in REFUSALS]
    reasons: dict[str, list[str]] = {}
    for name, why in UNMERGEABLE.items():
        reasons.setdefault(why, []).append(name)
    rows += [
        [named(names), "merging", why, "use the adapter beside its base"] for why, names in reasons.items()
    ]
    return table(["method", "cannot go with", "because", "instead"], rows)


def named(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# ---- what each method learns --------------------------------------------------------------------------------


def learnt() -> str:
    """The reported seeds of each method, the fewest trained parameters first."""
    study = measured(STUDY)
    if study is None:
        return NOT_YET
    rows, notes, missing = [], list[str](), list[str]()
    for name, row in sorted(study["table"].items(), key=lambda item: by_size(item[1])):
        if "loss" not in row:
            missing.append(name)
            notes += [f"`{name}` failed: {'; '.join(row['errors'])}."] if row["errors"] else []
            continue
        loss, exact = row["loss"], row["exact_match"]
        each = [run["exact_match"] for run in reported(study, name)]
        rows.append(
            [
                f"`{name}`",
                f"{row['trained']:,}",
                f"{row['rate']:.2g}{'*' if row['at_an_end'] else ''}",
                f"{row['default_rate']:g}",
                f"{loss['mean']:.3f}",
                f"{loss['lowest']:.3f} to {loss['highest']:.3f}",
                f"{exact['mean']:.3f}",
                " ".join(f"{value:.3f}" for value in each),
                f"{row['train_seconds']['mean']:.0f}",
                f"{row['peak_gb']['mean']:.2f}" if "peak_gb" in row else "",
            ]
        )
        if row["note"]:
            notes.append(f"`{name}`: {row['note']}.")
    head = ["method", "trained", "rate", "its default", "loss", "over seeds", "exact match", "by seed"]
    head += ["s of steps", "peak GB"]
    base = study["base"]
    if base.get("loss") is not None:
        notes.insert(0, f"The base: loss {base['loss']:.3f}, exact match {base['exact_match']:.3f}.")
    if missing:
        notes.append(f"A rate was looked for, and no seeds were run, of {named(missing)}.")
    if any(row.get("at_an_end") for row in study["table"].values()):
        notes.append("* the last rate that was tried in that direction: a further one may be better.")
    return table(head, rows, study) + "\n\n" + " ".join(notes)


def by_size(row: dict[str, Any]) -> tuple[float, float]:
    return row.get("trained", math.inf), row["loss"]["mean"] if "loss" in row else math.inf


def reported(study: Any, name: str) -> list[dict[str, Any]]:
    """The runs of a method that are reported, by seed."""
    runs = [run for run in study["runs"] if run["method"] == name and "curve" in run]
    return sorted(runs, key=lambda run: run["seed"])


def steps_to_loss() -> str:
    """LoRA+ beside LoRA: steps until the loss on the set to choose by is as low as each level."""
    study = measured(STUDY)
    names = ("lora", "loraplus")
    if study is None or not all(reported(study, name) for name in names):
        return NOT_YET
    rows = []
    for level in LEVELS:
        counts = {name: [reached(run["curve"], level) for run in reported(study, name)] for name in names}
        means = [sum(c) / len(c) if all(map(math.isfinite, c)) else math.inf for c in counts.values()]
        ratio = f"{means[1] / means[0]:.2f}" if all(map(math.isfinite, means)) else ""
        rows.append([f"{level:g}", *(", ".join(map(steps, counts[name])) for name in names), ratio])
    rates = [f"`{name}` at {study['table'][name]['rate']:.2g}" for name in names]
    return table(["loss", *rates, "LoRA+ / LoRA"], rows, study)


def reached(curve: Sequence[tuple[float, float]], level: float) -> float:
    """The step at which a curve of (step, loss) first comes down to a level, on a line in the loss's logarithm."""
    for (at, high), (to, low) in pairwise(curve):
        if low <= level:
            if high <= level:
                return at
            return at + (to - at) * math.log(high / level) / math.log(high / low)
    return math.inf


def steps(count: float) -> str:
    return f"{count:.0f}" if math.isfinite(count) else "not reached"


def drawn() -> str:
    """The picture, if there is one."""
    if measured(STUDY) is None:
        return "Not drawn yet."
    return "![Final loss of each method against its trained parameters](methods-loss.svg)"


TABLES: dict[str, Callable[[], str]] = {
    "methods": at_a_glance,
    "refusals": refused,
    "study": learnt,
    "study_figure": drawn,
    "loraplus": steps_to_loss,
}
