"""Where the milliseconds of one training step go: GPU time by kind of kernel, idle time, and the floor beside it.

    python benchmarks/step_profile.py --rank 16 --targets all --batch 4 --checkpoint off --variants "none;nf4"

Takes the arguments of benchmarks/peers/loraloom_bench.py, but without CUDA graphs unless they are asked for: replayed
products tell no shapes. After a warm-up, torch.profiler looks at --profiled steps; its trace is grouped by kernel names
and, for matrix products, by the shapes of the operation that launched them. What no pattern knows stands in `other`,
with its longest names. Idle is time within the steps in which no kernel runs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks" / "peers"), str(ROOT / "benchmarks")]
OUT = ROOT / "benchmarks" / "results" / "speed_profile.json"

PRODUCT = r"gemm|cutlass|nvjet|cublas|wgmma|s16816|_scaled_mm|splitk|gemv"
KERNELS = {  # the first pattern that a kernel's name holds decides, in lower case; products come last
    "attention": r"flash|fmha|attention|attn|cudnn.*sdpa|sdpa|cudnn::fusion",
    "dequantisation": r"dequant|turn4|turn8|channel_amax",
    "activations to fp8": r"quantize_rows|requantise",
    "head and loss": r"cross_entropy|nll|softmax|place_rows",
    "low-rank products": r"add_low",
    "norm, rope, swiglu": r"rms|norm|rope|rotary|swiglu|silu|sigmoid",
    "optimizer and clipping": r"adam|multi_tensor|foreach|lpnorm",
    "copies": r"^memcpy|^memset|copy|fill|catarray|direct_copy",
    "elementwise": r"elementwise|reduce_kernel|index|gather|scatter|triu|arange",
}


def group_of(kernel: str, shapes: list[list[int]], vocab: int, narrow: int) -> str:
    """Where a kernel belongs.

    shapes  of the matrices that the operation was given, where it is known
    narrow  the widest side that a product with an adapter's A or B can have
    """
    name = kernel.lower()
    if not re.search(PRODUCT, name):
        return next((group for group, pattern in KERNELS.items() if re.search(pattern, name)), "other")
    if re.search(KERNELS["attention"], name):
        return "attention"
    if "ovscale" in name:  # in 8 bits, where only frozen weights are multiplied
        return "frozen products"
    sides = [side for shape in shapes if len(shape) >= 2 for side in shape[-2:]]
    if not sides:
        return "products of unknown shape"
    if vocab in sides:
        return "head and loss"
    return "low-rank products" if min(sides) <= narrow else "frozen products"


def grouped(events: Iterable[dict[str, Any]], vocab: int, narrow: int) -> dict[str, Any]:
    """Microseconds by group, the longest names of each, and how long no kernel ran between the first and the last."""
    kernels, operations = [], dict[int, list[list[int]]]()
    for event in events:
        about = event.get("args", {})
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append(event)
        elif event.get("cat") == "cpu_op" and "External id" in about:
            operations[about["External id"]] = matrices(about.get("Input Dims", []))
    spent: dict[str, float] = defaultdict(float)
    names: dict[str, Counter[str]] = defaultdict(Counter)
    for event in kernels:
        shapes = operations.get(event.get("args", {}).get("External id", -1), [])
        group = group_of(event["name"], shapes, vocab, narrow)
        spent[group] += event["dur"]
        names[group][event["name"][:90]] += event["dur"]
    busy, span = occupied([(one["ts"], one["ts"] + one["dur"]) for one in kernels])
    return {
        "us": dict(spent),
        "busy_us": busy,
        "span_us": span,
        "kernels": len(kernels),
        "longest": {group: dict(found.most_common(6)) for group, found in names.items()},
    }


def matrices(dims: list[Any]) -> list[list[int]]:
    """The shapes among an operation's inputs; lists of tensors and scalars are left out."""
    return [shape for shape in dims if isinstance(shape, list) and shape and isinstance(shape[0], int)]


def occupied(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """How much of the time from the first start to the last end at least one span covers, and that time."""
    if not spans:
        return 0.0, 0.0
    spans = sorted(spans)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy, reached - spans[0][0]


def traced(step: Any, batches: list[Any]) -> list[dict[str, Any]]:
    """The profiler's events of some steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds, record_shapes=True) as found:
        for batch in batches:
            step(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        found.export_chrome_trace(str(path))
        with gzip.open(path, "rt", encoding="utf-8") as text:
            return list(json.load(text)["traceEvents"])


def profiled(a: argparse.Namespace) -> dict[str, Any]:
    """One setting: its step without the profiler, what the profiler saw, and the floor."""
    import kit
    import loop
    from loraloom_bench import Loraloom
    from speed_floor import floor, of_run

    r = a.runs[0]
    peer = Loraloom()
    a.checkpoint, a.run = r.checkpoint, r
    peer.build(a)
    batches = [peer.prepare(b, r) for b in kit.make_batches(a, r)]
    own = loop.measure(peer, a, r)
    events = traced(peer.step, batches[: a.profiled])
    names = {"qv": 2, "qkvo": 3, "all": 3}[a.targets]  # adapters that share an input stand side by side
    found = grouped(events, a.geom.vocab, max(64, names * a.rank))
    steps = min(a.profiled, len(batches))
    fp8 = peer.multiplies8
    work = of_run(a, r, peer.recompute)
    least = floor(work, quant=a.quant, fp8=fp8, cudnn=r.data == "random")
    return {
        "setting": {"quant": a.quant, "fp8": fp8, "recompute": peer.recompute, "fast": a.fast},
        "measured": own,
        "groups_ms": {group: us / steps / 1e3 for group, us in sorted(found["us"].items())},
        # Of a step without the profiler, which makes launches slower.
        "idle_ms": max(0.0, own["step_ms"] - found["busy_us"] / steps / 1e3),
        "span_ms": found["span_us"] / steps / 1e3,
        "kernels_a_step": found["kernels"] / steps,
        "floor_ms": least,
        "longest_us": found["longest"],
        "layers": peer.notes,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    import kit
    import loraloom_bench

    p = loraloom_bench.parser()
    p.set_defaults(graphs="off")
    p.add_argument("--profiled", type=int, default=3, help="steps that the profiler looks at")
    p.add_argument("--commit", default="", help="where there is no repository to ask")
    p.add_argument("--out", default=str(OUT))
    a = kit.parse(p, argv)
    loraloom_bench.own_path()
    import torch
    from command_line import command_line

    profiles = []
    for one in loraloom_bench.Loraloom.variants(a):
        began = time.perf_counter()
        profiles.append(profiled(one))
        loraloom_bench.Loraloom.release()
        show(profiles[-1])
        print(f"{time.perf_counter() - began:.0f} s", flush=True)
    own = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    record = {
        "what": f"{a.model} shapes, r = {a.rank} on {a.targets}, {a.runs[0].batch} x {a.runs[0].seq} tokens",
        "command": command_line(),
        "commit": a.commit or own.stdout.strip(),
        "machine": torch.cuda.get_device_name() if a.device == "cuda" else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "profiles": profiles,
    }
    Path(a.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def show(one: dict[str, Any]) -> None:
    print(
        one["setting"],
        f"{one['measured']['step_ms']:.1f} ms a step, {one['span_ms']:.1f} profiled",
        flush=True,
    )
    for group, ms in sorted(one["groups_ms"].items(), key=lambda item: -item[1]):
        least = one["floor_ms"].get(group)
        print(f"  {group:<28} {ms:8.2f} ms" + (f"   floor {least:.2f}" if least else ""))
    print(f"  {'idle':<28} {one['idle_ms']:8.2f} ms")
    for name, us in one["longest_us"].get("other", {}).items():
        print(f"    other: {us / 1e3:.2f} ms {name}")


if __name__ == "__main__":
    main()
