"""What each method of the family costs in a training step, beside LoRA in the same process.

    python benchmarks/method_cost.py                 one H100: 4 layers of Llama-2-7B's shapes, random weights
    python benchmarks/method_cost.py --tiny          a model of two narrow layers on the CPU, to try it

r = 16 on all linear layers (VeRA r = 256, RandLoRA r = 32), AdamW, steps of 4 x 2048 tokens, on a base in bf16 and
in NF4. LoRA is timed right before and right after each method: a ratio
is the method's mean step over the mean of the two. Memory is the peak of the allocator less what the base took
before. Slow starts (decompositions, passes over data) are not timed: their tensors are filled with small random
numbers. Trained parameters are counted on the shapes of all 32 layers. Written to benchmarks/results/method_cost.json
after each method; one that fails leaves its error there.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as in `loraloom train`

import torch
from command_line import command_line
from method_settings import INVOCATION, NOTES, SLOW_STARTS, counted, spec_of
from random_weights import random_model

from loraloom import methods
from loraloom.adapt import Adapters
from loraloom.adapter import Adapter
from loraloom.config import TrainConfig
from loraloom.dressing import dress
from loraloom.errors import UserError
from loraloom.kernels.matmul_frozen import release_buffers
from loraloom.kernels.twin import path_of
from loraloom.optim import make_optimizer, set_rates
from loraloom.packing import Batch, pack
from loraloom.quant import stored_bytes
from loraloom.refusals import refuse
from loraloom.shapes import published
from loraloom.skeleton import make_shape
from loraloom.step import train_step
from loraloom.workload import Made

ROOT = Path(__file__).parents[1]
BASES: dict[str, str | None] = {"bf16": None, "nf4": "nf4"}
AT, OF = 600, 2000  # the steps' numbers: AdaLoRA's budget falls there, and Delta-LoRA's W moves


def rows(count: int, length: int, vocabulary: int) -> list[Made]:
    """Random tokens with the invocation in the middle; all but the first carry loss."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        ids[length // 2 : length // 2 + len(INVOCATION)] = INVOCATION
        made.append(Made(ids))
    return made


def fill(adapter: Adapter) -> None:
    """Small random numbers in place of zeros, so that every tensor takes part."""
    with torch.no_grad():
        for site in adapter.sites.values():
            for tensor in site.p.values():
                if tensor.is_floating_point() and not tensor.any():
                    tensor.normal_(0.0, 0.01)


def release() -> None:
    release_buffers()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Bench:
    """A base, and the steps that every method takes on it."""

    def __init__(self, a: argparse.Namespace, shape: Any, base: str, device: torch.device) -> None:
        self.a, self.shape, self.device = a, shape, device
        release()
        self.model = random_model(shape, device=device, table=BASES[base])
        self.weights = sum(map(stored_bytes, self.model.parameters()))
        sizes = [tuple(map(int, one.split("x"))) for one in a.batches.split(",")]
        self.work = {
            f"{count}x{length}": rows(count, length, shape.vocab_size)
            for count, length in (sizes if base == "bf16" else sizes[:1])
        }

    def block(self, name: str, steps: int) -> dict[str, Any]:
        """A method put on, trained for some steps of each batch, and taken off."""
        release()
        before = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        spec = spec_of(name, self.a.r, self.shape.num_hidden_layers)
        blank = name in SLOW_STARTS or spec.make().needs is not None
        adapters = Adapters(self.model)
        try:
            adapter = adapters.add("default", spec, blank=blank)
            if blank:
                for (
                    site
                ) in adapter.sites.values():  # a blank adapter may stand where training could not start
                    refuse(site.method, spec, self.model, site.layer)
                fill(adapter)
            adapter.ready = True
            adapters.train()
            optimizer = make_optimizer(adapters.groups(1e-5), TrainConfig())
            set_rates(optimizer, 1.0)
            found = {"trained": sum(p.numel() for p in adapters.parameters()), "batches": {}}
            for label, examples in self.work.items():
                batches = pack(dress(self.model, examples), micro_tokens=1 << 20, packing=False, pad_id=0)
                timed = self.steps(adapters, optimizer, batches, steps)
                if self.device.type == "cuda":
                    timed["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
                found["batches"][label] = timed
            return found
        finally:
            adapters.detach()

    def steps(self, adapters: Adapters, optimizer: Any, batches: list[Batch], count: int) -> dict[str, Any]:
        """Mean seconds of a step, with the fastest and the slowest; raises if a gradient is none."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for number in range(self.a.warmup + count):
            synchronize()
            began = time.perf_counter()
            stats = train_step(
                self.model, adapters, optimizer, batches, step=AT + number, num_steps=OF, max_norm=1.0
            )
            synchronize()
            seconds.append(time.perf_counter() - began)
            if not (stats.grad_norm > 0 and math.isfinite(stats.grad_norm)):
                raise ValueError(f"step {number}: gradient norm {stats.grad_norm}")
        timed = seconds[self.a.warmup :]
        return {
            "seconds": statistics.mean(timed),
            "median": statistics.median(timed),
            "fastest": min(timed),
            "slowest": max(timed),
            "loss": stats.loss,
            "grad_norm": stats.grad_norm,
        }


def measure(bench: Bench, name: str, before: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A method between two LoRAs; its figures, and the second LoRA, which is the next one's first."""
    try:
        found = bench.block(name, bench.a.steps)
    except UserError as error:
        return {"refused": error.message}, before
    except Exception as error:
        return {
            "error": f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
        }, before
    after = bench.block("lora", bench.a.steps // 2)
    for label, row in found["batches"].items():
        around = [one["batches"][label] for one in (before, after)]
        row["lora_seconds"] = statistics.mean(one["seconds"] for one in around)
        row["time_to_lora"] = row["seconds"] / row["lora_seconds"]
        if "peak_gb" in row:
            row["gb_over_lora"] = row["peak_gb"] - around[1]["peak_gb"]
    return found, after


def words(name: str, base: str, found: dict[str, Any]) -> str:
    if "batches" not in found:
        return f"{base} {name}: {found}"
    first = next(iter(found["batches"].values()))
    memory = f", {first['peak_gb']:.2f} GB ({first['gb_over_lora']:+.2f})" if "peak_gb" in first else ""
    return f"{base} {name}: {1e3 * first['seconds']:.1f} ms, {first['time_to_lora']:.3f} of LoRA{memory}"


def main() -> None:
    a = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() and not a.tiny else "cpu")
    whole = tiny_shape() if a.tiny else published(a.shape)
    record = about(a, device)
    names = a.methods.split(",") if a.methods else methods.names()
    for name in names:
        record["methods"][name] = {"note": NOTES.get(name, "")}
        try:
            record["methods"][name]["trained_by_all_layers"] = counted(name, a.r, whole)
        except Exception as error:  # a method that cannot be counted may still be measured
            record["methods"][name]["uncounted"] = f"{type(error).__name__}: {error}"
    shape = tiny_shape() if a.tiny else published(a.shape)
    shape.num_hidden_layers = min(a.layers, shape.num_hidden_layers)
    began = time.perf_counter()
    for base in a.bases.split(","):
        bench = Bench(a, shape, base, device)
        record["weights_gb"][base] = bench.weights / 1e9
        bench.block("lora", a.steps)  # kernels are compiled, clocks are up
        lora = bench.block("lora", a.steps // 2)
        for name in names:
            found, lora = measure(bench, name, lora)
            record["methods"][name][base] = found
            print(f"{time.perf_counter() - began:6.1f} s  {words(name, base, found)}", flush=True)
            Path(a.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        del bench
        release()


def tiny_shape() -> Any:
    return make_shape(
        "llama",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )


def about(a: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    shape = "a tiny model's" if a.tiny else f"{a.layers} layers of {a.shape}'s"
    return {
        "what": f"a training step of each method, r = {a.r} on all linear layers, {shape} shapes, random weights",
        "command": command_line(),
        "commit": a.commit or commit.stdout.strip(),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "kernels": path_of(device)[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "loraloom")},
        "layers": 2 if a.tiny else a.layers,
        "batches": a.batches.split(","),
        "weights_gb": {},
        "methods": {},
    }


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="llama2-7b")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--methods", help="some, separated by commas")
    p.add_argument("--bases", default=",".join(BASES))
    p.add_argument("--batches", default="4x2048", help="rows x tokens; NF4 takes the first one alone")
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--steps", type=int, default=20, help="timed; half as many of LoRA before and after")
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--tiny", action="store_true", help="two narrow layers on the CPU")
    p.add_argument("--commit", default="", help="where there is no repository to ask")
    p.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "method_cost.json"))
    a = p.parse_args()
    if a.tiny:
        a.batches, a.steps, a.warmup = "1x64,2x32", min(a.steps, 4), 1
    return a


if __name__ == "__main__":
    main()
