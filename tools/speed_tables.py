"""Tables of docs/speed.md from benchmarks/results/speed_*.json, as tables.py makes those of the other pages.

What has no result yet says so, or is left out where a page would only grow by it.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import tables
from tables import table

NOT_YET = "Not measured yet."
NAMES = {
    "loraloom": "**LoRALoom**",
    "peft_hf": "PEFT",
    "peft_liger": "PEFT with Liger",
    "unsloth": "Unsloth",
    "torchtune": "torchtune",
    "litgpt": "LitGPT",
}
BASES = {"none": "bf16", "nf4": "NF4", "fp8": "fp8"}
LISTS = {  # of benchmarks/peers/run_all.sh beside main and alpaca, and what they are
    "small": "Llama-3.2-1B's shape, r = 16 on all linears, 4 x 2,048",
    "big": "Llama-3.1-8B's shape, r = 16 on all linears, 4 x 2,048",
    "qv": "r = 8 on q and v, 4 x 2,048",
    "r256": "r = 256 on all linears, 4 x 2,048",
    "lengths": "r = 16 on all linears, sequences of 512 and of 4,096",
    "general": "Without fused layers, as models of other kinds run, r = 16 on all linears, 4 x 2,048",
    "stock": "the stock tools, r = 16 on all linears, 4 x 2,048",
    "recompute": "the other tools with recomputation, r = 16 on all linears, 4 x 2,048",
    "padded": "what other ways make of Alpaca-like lengths",
    "ours": "every way of ours, r = 16 on all linears, 4 x 2,048",
}


def measured(name: str) -> Any:
    path = tables.RESULTS / f"speed_{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def tool(row: dict[str, Any]) -> str:
    more = [key for key in ("compile", "autocast") if row.get(key) == "on"]
    more = ["compiled" if key == "compile" else key for key in more]
    if row["data"] != "random" and row["packing"] == "on" and pass_of(row) != 8192:
        more.append(f"passes of {pass_of(row):,}")
    return ", ".join([NAMES.get(row["peer"], row["peer"]), *more])


def base(row: dict[str, Any]) -> str:
    """How the base is kept, and what its products run in where that is told."""
    words = BASES.get(row["quant"], row["quant"]) + ", not fused" * (row.get("fast") == "off")
    if row["peer"] != "loraloom" or row["quant"] == "none":
        return words
    graphs = {"on": ", every pass as a CUDA graph", "off": ", no CUDA graphs"}.get(row.get("graphs", ""), "")
    return f"{words}, {'fp8' if row.get('fp8') == 'on' else 'bf16'} products{graphs}"


def recomputed(row: dict[str, Any]) -> str:
    if "recompute" in row:
        return {"none": "no", "gate_up": "gate and up", "full": "yes", "offload": "yes, on the host"}[
            row["recompute"]
        ]
    if row["checkpoint"] == "off":
        return "no"
    return "yes, on the host" if row["peer"] == "unsloth" and row["checkpoint"] == "on" else "yes"


def pass_of(row: dict[str, Any]) -> int:
    """The tokens that a pass has room for."""
    return int(row["batch"]) * int(row["seq"])


def over_best(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Ours over the fastest other tool with a base of the same kind, recomputing or not as ours does.

    Where none of that kind was measured, a quantised base of ours is compared with the fastest in bf16.
    """
    others = [
        other
        for other in rows
        if other["peer"] != "loraloom"
        and (other["checkpoint"] == "off") == (row["checkpoint"] == "off")
        and (other.get("packing") != "on" or pass_of(other) == pass_of(row))
    ]
    same = [other for other in others if (other["quant"] == "none") == (row["quant"] == "none")]
    best = max((other["tokens_per_s"] for other in same or others), default=0)
    if not best or row["peer"] != "loraloom":
        return ""
    return f"{row['tokens_per_s'] / best:.2f}" + ("" if same else " (of bf16)")


def speeds(rows: list[dict[str, Any]]) -> str:
    """The tools beside each other: bases apart, the fastest first."""
    order = sorted(rows, key=lambda row: (row["quant"] != "none", -row["tokens_per_s"]))
    lines = [
        [
            tool(row),
            base(row),
            recomputed(row),
            f"{row['tokens_per_s']:,.0f}",
            over_best(row, rows),
            f"{row['step_ms']:.1f}",
            f"{row['peak_mem_gb']:.2f}" if row.get("peak_mem_gb") else "",
            *numbers(row),
        ]
        for row in order
    ]
    head = ["tool", "base", "recomputes", "tokens/s", "over the best other", "ms a step", "peak GB"]
    return table([*head, "loss", "gradient norm", "s timed"], lines)


def numbers(row: dict[str, Any]) -> list[str]:
    """Loss and gradient norm of the first and the last step, and how long was timed."""
    loss = f"{row['loss0']:.3f} to {row['lossN']:.3f}"
    norm = f"{row['grad_norm0']:.3g} to {row['grad_normN']:.3g}" if row.get("grad_norm0") is not None else ""
    return [loss, norm, f"{row['sustained_s']:.0f}" if "sustained_s" in row else ""]


def versions(rows: Iterable[dict[str, Any]]) -> str:
    """Of everything that took part; a tool may bring its own version of a package."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for name, value in row["versions"].items():
            found[name].add(value)
    return ", ".join(f"{name} {' and '.join(sorted(each))}" for name, each in sorted(found.items()))


def speed_list(name: str) -> str:
    """A list of run_all.sh; on which card, at which commits, and how to repeat it."""
    record = measured(name)
    if record is None or not record["rows"]:
        return NOT_YET
    rows = record["rows"]
    commits = ", ".join(dict.fromkeys(row["commit"][:7] for row in rows))
    about = f"{record['machine']}; {versions(rows)}; commit {commits}; `{record['command']}`"
    shapes = dict.fromkeys((row.get("batch"), row.get("seq")) for row in rows)
    if len(shapes) == 1 or rows[0]["data"] != "random":
        return f"{speeds(rows)}\n\n{about}"
    parts = [
        f"{batch} x {seq:,} tokens\n\n"
        + speeds([row for row in rows if (row.get("batch"), row.get("seq")) == shape])
        for shape in shapes
        for batch, seq in [shape]
    ]
    return "\n\n".join([*parts, about])


def others() -> str:
    """Every further list that there are results of."""
    parts = [f"### {words}\n\n{speed_list(name)}" for name, words in LISTS.items() if measured(name)]
    return "\n\n".join(parts) or NOT_YET


def earlier() -> str:
    """The tools measured before this project was, by the same kit: the median of eight steps, or of sixteen."""
    path = tables.RESULTS / "peers_2026-11-21.jsonl"
    if not path.is_file():
        return NOT_YET
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "error" not in row]
    lines = [
        [
            tool(row),
            base(row),
            recomputed(row),
            "Alpaca-like" if row["data"] != "random" else f"{row['batch']} x {row['seq']:,}",
            {"on": "packed", "off": "padded" if row["data"] != "random" else ""}[row["packing"]],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['peak_mem_gb']:.1f}",
        ]
        for row in sorted(
            rows, key=lambda row: (row["data"] != "random", row["quant"] != "none", -row["tokens_per_s"])
        )
    ]
    head = ["tool", "base", "recomputes", "tokens", "rows", "tokens/s", "peak GB"]
    return f"{table(head, lines)}\n\n{rows[0]['device']}; {versions(rows)}; 2026-11-21"


def profile() -> str:
    """GPU time of a step by kind of kernel, each beside the least that it could take."""
    record = measured("profile")
    if record is None:
        return NOT_YET
    profiles = record["profiles"]
    groups = dict.fromkeys(group for one in profiles for group in one["groups_ms"])
    order = sorted(groups, key=lambda group: -max(one["groups_ms"].get(group, 0) for one in profiles))
    lines = []
    for group in order:
        line = [group]
        for one in profiles:
            least = one["floor_ms"].get(group)
            line += [cell(one["groups_ms"].get(group)), cell(least)]
        lines.append(line)
    lines.append(["idle", *(text for one in profiles for text in (cell(one["idle_ms"]), ""))])
    totals = [(one["measured"]["step_ms"], sum(one["floor_ms"].values())) for one in profiles]
    lines.append(["**all**", *(f"**{ms:.1f}**" for pair in totals for ms in pair)])
    names = [", ".join(setting(one["setting"])) for one in profiles]
    head = ["ms of a step", *(text for name in names for text in (name, "floor"))]
    return f"{table(head, lines, record)}\n\n{record['what']}."


def setting(found: dict[str, Any]) -> list[str]:
    words = [BASES.get(found["quant"], found["quant"])]
    words += ["fp8 products" if found["fp8"] else "bf16 products"] * (found["quant"] != "none")
    words += [f"recompute={found['recompute']}"] * (found["recompute"] != "none")
    return words + ["not fused"] * (found["fast"] == "off")


def cell(ms: float | None) -> str:
    return f"{ms:.1f}" if ms else ""


def whole_run() -> str:
    """`loraloom train` from start to end."""
    paths = sorted(tables.RESULTS.glob("speed_alpaca_run*.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not records:
        return NOT_YET
    lines = []
    for one in records:
        found = one["result"]
        lines.append(
            [
                BASES.get(one["quantize"], one["quantize"]),
                adapters(one),
                f"{one['samples']:,}",
                f"{found['tokens']:,}",
                f"{found['wall_s']:.0f}",
                f"{found['steps_s']:.0f}",
                f"{found['evaluations_s']:.0f}",
                f"{100 * found['share_outside_of_steps']:.0f} %",
                f"{found['tokens_per_s_sustained']:,.0f}",
                f"{found['peak_gb']:.1f}",
            ]
        )
    head = [
        "base",
        "adapters",
        "samples",
        "tokens",
        "s, whole command",
        "s in steps",
        "s, held-out losses",
        "outside of steps",
    ]
    return table([*head, "tokens/s of steps", "peak GB"], lines, *records)


def adapters(record: dict[str, Any]) -> str:
    """Rank and place of a whole run's adapters, and their dropout if there is one."""
    chosen = dict(one.split("=", 1) for one in record["set"])
    targets = chosen.get("target_modules", "all-linear").strip("[]")
    words = f"r {record['rank']} on {'all' if targets == 'all-linear' else targets.replace(',', ', ')}"
    return words + (f", dropout {chosen['dropout']}" if "dropout" in chosen else "")


def fp8_quality() -> str:
    """What products in fp8 change: gradients of the first step, and what training comes to."""
    record = measured("fp8_quality")
    if record is None:
        return NOT_YET
    g = record["gradients"]
    text = (
        "Cosine of the adapter's gradients at the first step, fp8 to bf16 products on the same base: "
        f"{g['overall']:.4f} over all {g['tensors']} tensors, {g['median']:.4f} in the median, {g['lowest']:.4f} at "
        f"the lowest; their norm is {g['norm_ratio']:.3f} times as large."
    )
    if not record["runs"]:
        return text
    lines = []
    for fp8 in (False, True):
        runs = sorted((run for run in record["runs"] if run["fp8"] == fp8), key=lambda run: run["seed"])
        row = ["fp8 products" if fp8 else "bf16 products"]
        for name in ("loss", "exact_match"):
            each = [run[name] for run in runs]
            row += [f"{statistics.mean(each):.3f}", " ".join(f"{value:.3f}" for value in each)]
        lines.append(row)
    head = [record["what"], "held-out loss", "by seed", "exact match", "by seed"]
    return f"{text}\n\n{table(head, lines, record)}"


def short_steps() -> str:
    """Short steps launched one kernel at a time, and replayed."""
    record = measured("short_steps")
    if record is None:
        return NOT_YET
    found = {(row["tokens"], row["graphs"]): row for row in record["rows"]}
    lines = []
    for tokens in dict.fromkeys(row["tokens"] for row in record["rows"]):
        plain, replayed = found[tokens, False], found[tokens, True]
        lines.append(
            [
                f"{tokens:,}",
                f"{plain['step_ms']:.1f}",
                f"{replayed['step_ms']:.1f}",
                f"{plain['step_ms'] / replayed['step_ms']:.1f}",
                f"{plain['loss_at_5']:.5f}, {replayed['loss_at_5']:.5f}",
            ]
        )
    head = ["tokens a step", "ms", "ms as a graph", "times as fast", "loss of step 6, both ways"]
    return table(head, lines, record)


def attention() -> str:
    """Milliseconds of the attention kernels by the documents' length."""
    path = tables.RESULTS / "attention_kernels.json"
    if not path.is_file():
        return NOT_YET
    record = json.loads(path.read_text(encoding="utf-8"))
    kinds = {"varlen": "FlashAttention", "dense": "cuDNN, dense", "short": "short documents"}
    found = {(row["length"], row["kind"]): row for row in record["rows"] if row["heads"] == "7B"}
    lines = []
    for length in dict.fromkeys(length for length, _ in found):
        line = ["like Alpaca's" if length == "alpaca" else f"{length:,}"]
        for kind in kinds:
            row = found.get((length, kind))
            line.append(f"{row['forward_ms']:.2f} + {row['backward_ms']:.2f}" if row else "")
        lines.append(line)
    head = ["tokens of a document", *(f"{words}, ms" for words in kinds.values())]
    what = f"Forward and backward over {record['tokens']:,} tokens, 32 heads of 128 features."
    return f"{table(head, lines, record)}\n\n{what}"


TABLES: dict[str, Callable[[], str]] = {
    "speed_main": lambda: speed_list("main"),
    "speed_alpaca": lambda: speed_list("alpaca"),
    "speed_others": others,
    "speed_earlier": earlier,
    "speed_attention": attention,
    "speed_profile": profile,
    "speed_run": whole_run,
    "speed_short": short_steps,
    "speed_fp8": fp8_quality,
}
