"""What adapters cost in a forward pass: the base, LoRA merged and beside the weights, AdapterL and AdapterH.

    overhead = median over rounds of  t(variant) / ((t(base) + t(base, again)) / 2) - 1

Every round times each variant once, in an order drawn anew, so that what drifts (clocks, heat, other work) falls on
all alike; an overhead is taken round by round. Its interval is that of the median by order statistics, 95 % or more,
whatever the distribution. The base is timed twice: the second one beside the first shows what the machine's noise is
worth. All variants share one base's tensors; the merged one is a plain model, without our code. Weights are random:
they do not change the time. As in generation, only the last token's logits are computed.

units   milliseconds of wall-clock, the GPU waited for; or of this process's time on the CPU, which leaves out what
        other processes take
source  Hu et al. 2021, arXiv:2106.09685, table 1: GPT-2 medium, 100 rounds, a Quadro RTX8000
"""

from __future__ import annotations

import copy
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import attach
from .environment import environment
from .errors import UserError
from .model import DTYPES
from .skeleton import make_shape, meta_model
from .wording import number, percent

GPT2_MEDIUM = {"n_embd": 1024, "n_head": 16, "n_layer": 24, "n_positions": 1024, "vocab_size": 50257}
RANK = 4  # of LoRA on q and v
BASE, AGAIN, MERGED, UNMERGED = "base", "base, again", "LoRA, merged", "LoRA, beside the weights"
PUBLISHED = {  # ms: base or merged LoRA, AdapterL, AdapterH
    (32, 512): {BASE: 1449.4, MERGED: 1449.4, "AdapterL": 1482.0, "AdapterH": 1492.2},
    (16, 256): {BASE: 338.0, MERGED: 338.0, "AdapterL": 354.8, "AdapterH": 366.3},
    (1, 128): {BASE: 19.8, MERGED: 19.8, "AdapterL": 23.9, "AdapterH": 25.8},
}
ADAPTERS = {(32, 512): 500_000}  # weights of the bottleneck adapters there; 11 million elsewhere
MANY = 11_000_000
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Case:
    """One size of input; adapter_weights is about how many AdapterL and AdapterH have."""

    batch: int
    length: int
    adapter_weights: int


def case_of(text: str) -> Case:
    """1x128 as a batch of 1 with 128 tokens.

    raises  UserError if it is not written so
    """
    batch, _, length = text.lower().partition("x")
    if not (batch.isdigit() and length.isdigit() and int(batch) and int(length)):
        raise UserError(f"case {text!r}: write batch x length, such as 1x128")
    size = int(batch), int(length)
    return Case(*size, ADAPTERS.get(size, MANY))


def measure(
    cases: Sequence[Case],
    *,
    device: torch.device,
    dtype: str = "float32",
    rounds: int = 100,
    shape: dict[str, Any] | None = None,
    seed: int = 0,
    clock: str = "wall",
    told: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Every case, as JSON.

    shape  of a GPT-2, instead of the medium one
    clock  wall, or cpu: this process's time on the CPU
    told   of each case as it is done

    raises  UserError for an input longer than the model's context, or a clock that does not see the device
    """
    if clock == "cpu" and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise UserError(
            "the time on the CPU is a latency only for one thread on a CPU",
            hint="OMP_NUM_THREADS=1, --device cpu",
        )
    fields = GPT2_MEDIUM | (shape or {})
    for case in cases:
        if case.length > fields["n_positions"]:
            raise UserError(f"{case.length} tokens, and the model takes {fields['n_positions']}")
    base = filled(meta_model(make_shape("gpt2", **fields), dtype=DTYPES[dtype]), device, seed)
    rows = []
    for case in cases:
        models, weights = variants(base, case.adapter_weights, seed)
        ids = torch.randint(0, fields["vocab_size"], (case.batch, case.length), device=device)
        apart = float((run(models[MERGED], ids) - run(models[UNMERGED], ids)).float().norm())
        times = timed(models, ids, rounds, device, CLOCKS[clock], seed)
        row = summary(case, times, weights)
        row["merged_apart"] = apart / float(run(models[UNMERGED], ids).float().norm())
        rows.append(row)
        told(row)
    return about(fields, device, dtype, rounds) | {"clock": clock, "cases": rows}


def about(fields: dict[str, Any], device: torch.device, dtype: str, rounds: int) -> dict[str, Any]:
    """What was measured on what."""
    found = environment()
    cuda = device.type == "cuda"
    return {
        "what": f"GPT-2 with {fields['n_layer']} layers of width {fields['n_embd']}, random weights; "
        f"LoRA r = {RANK} on q and v",
        "machine": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "device": device.type,
        "dtype": dtype,
        "threads": None if cuda else torch.get_num_threads(),
        "rounds": rounds,
        "commit": found["commit"],
        "versions": {name: found[name] for name in ("torch", "transformers", "loraloom")},
    }


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


@torch.no_grad()
def filled(model: Any, device: torch.device, seed: int) -> Any:
    """A model of shapes with random weights on a device."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model = model.to_empty(device=device)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.fill_(1.0)
    return model.eval()


def shared(model: Any) -> Any:
    """A model with modules of its own on the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@torch.no_grad()
def variants(base: Any, adapter_weights: int, seed: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The models by name, and how many weights each adds."""
    models, weights = {BASE: base, AGAIN: shared(base)}, {BASE: 0, AGAIN: 0}
    beside = shared(base)
    lora = attach(beside, "lora", r=RANK, target_modules=["q", "v"], seed=seed)
    for parameter in lora.parameters():  # B would be zero, and merging would change nothing
        parameter.normal_(0.0, 0.02)
    lora.eval()
    lora.merge("default")
    merged = shared(base)
    for name, parameter in beside.named_parameters():
        path, _, leaf = name.rpartition(".")
        merged.get_submodule(path)._parameters[leaf] = parameter
    lora.unmerge()
    models |= {MERGED: merged, UNMERGED: beside}
    weights |= {MERGED: 0, UNMERGED: count(lora)}
    for name, method in (("AdapterL", "adapterl"), ("AdapterH", "adapterh")):
        own = shared(base)
        added = attach(own, method, r=bottleneck(method, base.config, adapter_weights), seed=seed)
        added.eval()
        models[name], weights[name] = own, count(added)
    return models, weights


def count(adapters: Any) -> int:
    return sum(p.numel() for p in adapters.parameters())


def bottleneck(method: str, config: Any, wanted: int) -> int:
    """The width of the bottleneck whose count is nearest to the wanted one.

    source  the counts of adapterl.py and adapterh.py: 2 D r + r + D an adapter, and 2 D of AdapterL's norm
    """
    width, layers = config.n_embd, config.n_layer
    adapters, norm = (layers, 2 * width) if method == "adapterl" else (2 * layers, 0)
    return max(1, round((wanted / adapters - width - norm) / (2 * width + 1)))


@torch.inference_mode()
def run(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """The logits of each row's last token."""
    logits: Tensor = model(ids_BT, use_cache=False, logits_to_keep=1).logits
    return logits


def timed(
    models: dict[str, Any],
    ids: Tensor,
    rounds: int,
    device: torch.device,
    clock: Callable[[], float],
    seed: int,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after two rounds that are not counted."""
    order, names = random.Random(seed), list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 2):
        for name in order.sample(names, len(names)):
            synchronise(device)
            began = clock()
            run(models[name], ids)
            synchronise(device)
            if turn >= 2:
                times[name].append(clock() - began)
    return times


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(case: Case, times: dict[str, list[float]], weights: dict[str, int]) -> dict[str, Any]:
    """A case's numbers: medians, the middle half of the times, overheads with their intervals."""
    rows: dict[str, Any] = {}
    both = [(one + two) / 2 for one, two in zip(times[BASE], times[AGAIN])]
    for name, seconds in times.items():
        over = [own / base - 1 for own, base in zip(seconds, times[BASE] if name == AGAIN else both)]
        known = PUBLISHED.get((case.batch, case.length), {})
        rows[name] = {
            "weights": weights[name],
            "ms": 1e3 * median(seconds),
            "ms_from": 1e3 * quartile(seconds, 1),
            "ms_to": 1e3 * quartile(seconds, 3),
            "overhead": median(over),
            "interval": interval(over),
            "published_ms": known.get(name),
            "published_overhead": known[name] / known[BASE] - 1 if name in known else None,
        }
    return {
        "batch": case.batch,
        "length": case.length,
        "variants": rows,
        "says": [says(name, row) for name, row in rows.items() if name != BASE],
    }


def beside(name: str) -> str:
    """What a variant's time is compared with, in words."""
    return "itself" if name == AGAIN else "the base"


def quartile(values: Sequence[float], which: int) -> float:
    """The value a quarter, or three, of the way through the sorted ones."""
    return sorted(values)[round(which * (len(values) - 1) / 4)]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Where the true median lies with 95 % or more, by order statistics; None for fewer than six values."""
    n = len(values)
    tail, k = 0.0, -1
    while tail + comb(n, k + 1) / 2**n <= 0.025:
        k += 1
        tail += comb(n, k) / 2**n
    inside = sorted(values)
    return (inside[k], inside[n - 1 - k]) if k >= 0 else None


def says(name: str, row: dict[str, Any]) -> str:
    """An overhead in words: within the noise where its interval holds zero."""
    if row["interval"] is None:
        return f"{name}: {share(row['overhead'])}; too few rounds to know the noise"
    low, high = row["interval"]
    if low <= 0 <= high:
        return f"{name} is within the noise of {beside(name)} ({share(low)} to {share(high)})"
    words = "slower" if row["overhead"] > 0 else "faster"
    apart = f"{percent(abs(row['overhead']), 2)} {words} than {beside(name)}"
    busy = "; the machine was not quiet" if name == AGAIN else ""
    return f"{name} is {apart} ({share(low)} to {share(high)}){busy}"


def share(value: float) -> str:
    return ("+" if value > 0 else "") + percent(value, 2)


COLUMNS = ("batch x length", "variant", "weights added", "ms", "middle half", "overhead", "95 %", "article 3")


def cells(row: dict[str, Any]) -> list[list[str]]:
    """A case as lines of text under COLUMNS."""
    lines = []
    for name, one in row["variants"].items():
        known, span = one["published_overhead"], one["interval"]
        lines.append(
            [
                f"{row['batch']} x {row['length']}",
                name,
                f"{one['weights']:,}",
                number(one["ms"]),
                f"{number(one['ms_from'])} to {number(one['ms_to'])}",
                "" if name == BASE else share(one["overhead"]),
                "" if name == BASE or span is None else f"{share(span[0])} to {share(span[1])}",
                "" if known is None or name == BASE else share(known),
            ]
        )
    return lines
