"""The table of article 2, section 5, on one GPU: LoRA on a base in bf16, NF4 and FP4, with and without double
quantisation: seconds a step, peak memory, loss.

    python benchmarks/article2.py                    one H100: Llama-2-7B shapes, random weights
    python benchmarks/article2.py --shape llama3.2-1b --steps 2 --cpu      to try it

Its settings: r = 8 on q and v, alpha 16, dropout 0.05, AdamW at 3e-4, batch 128, lengths like Alpaca's (log-normal
with a median of 110, 16 to 1,024). The micro-batch is the largest that the planner says fits. Written to
benchmarks/results/article2.json.
"""

from __future__ import annotations

import argparse
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
from random_weights import random_model

from loraloom.adapt import Adapters
from loraloom.config import RunConfig, resolve
from loraloom.fit import choose, find_gpu
from loraloom.kernels.twin import path_of
from loraloom.memory import Predictor, tier
from loraloom.model import settle_attention
from loraloom.optim import make_optimizer, set_rates
from loraloom.packing import Batch, Example, pack
from loraloom.products8 import use_fp8
from loraloom.quant import bits_per_parameter, stored_bytes
from loraloom.recompute import apply, fuse
from loraloom.shapes import published
from loraloom.step import train_step
from loraloom.workload import Made
from loraloom.workshop import spec_of

ROOT = Path(__file__).parents[1]
BASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "nf4, double": {"model.quantize": "nf4"},
    "nf4": {"model.quantize": "nf4", "model.double_quant": False},
    "fp4, double": {"model.quantize": "fp4"},
    "fp4": {"model.quantize": "fp4", "model.double_quant": False},
}
PUBLISHED = {
    "bf16": (6685.75, 21.33),
    "nf4": (10059.53, 14.18),
    "fp4": (9334.45, 14.19),
}  # seconds, GB; one A100


def examples(count: int, vocabulary: int, seed: int) -> list[Example]:
    """Random tokens in Alpaca-like lengths; every token but the first carries loss."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Example] = []
    for row in range(count):
        drawn = math.exp(math.log(110) + 0.6 * torch.randn((), generator=generator).item())
        ids = torch.randint(0, vocabulary, (int(min(1024, max(16, drawn))),), generator=generator)
        made.append(Made(ids.tolist(), f"row {row}"))
    return made


class Steps:
    """The work of one run, as the planner wants to see it."""

    def __init__(self, steps: list[list[Example]], packing: bool = True) -> None:
        self.steps, self.packing = steps, packing
        self.step_tokens = 2 * max(sum(len(one.ids) for one in step) for step in steps)

    def pack(self, number: int, micro_tokens: int) -> list[Batch]:
        return pack(self.steps[number], micro_tokens=micro_tokens, packing=self.packing, pad_id=0)

    def batches(self, micro_tokens: int) -> list[Batch]:
        every = [one for number in range(len(self.steps)) for one in self.pack(number, micro_tokens)]
        heaviest = max(every, key=lambda one: (one.ids.numel(), one.targets))
        return [heaviest] * (2 if len(every) > len(self.steps) else 1)

    def words(self, micro_tokens: int) -> str:
        return f"{len(self.steps)} steps of {len(self.steps[0])} examples"


def settings(a: argparse.Namespace, base: dict[str, Any]) -> RunConfig:
    chosen = {
        "model": a.shape,
        "model.dtype": "bfloat16",
        "model.device": "cpu" if a.cpu else "cuda",
        "data": "none",
        "output": "none",
        "r": a.r,
        "alpha": a.alpha,
        "dropout": a.dropout,
        "target_modules": a.targets.split(","),
        "train.learning_rate": 3e-4,
        "train.optimizer": a.optimizer,
        "train.recompute": "full" if a.recompute else "none",
        "train.batch_size": a.batch,
    }
    return resolve(None, chosen | base)[0]


def measure(
    config: RunConfig, shape: Any, work: Steps, micro_tokens: int, device: torch.device
) -> dict[str, Any]:
    """Train on random weights; seconds of each step after the first two, the peak, losses and gradient norms."""
    cuda = device.type == "cuda"
    m = config.model
    began = time.perf_counter()
    table = None if m.quantize == "none" else m.quantize
    model = random_model(shape, device=device, table=table, double=m.double_quant)
    settle_attention(model, m.attention, device, torch.bfloat16)
    if table is not None:
        use_fp8(model, m.fp8, device)
    loaded = time.perf_counter() - began
    adapters = Adapters(model)
    adapters.add("default", spec_of(config))
    adapters.train()
    fuse(adapters, config.train, gpu=cuda)
    apply(model, adapters, tier(config))
    optimizer = make_optimizer(adapters.groups(3e-4), config.train)
    set_rates(optimizer, 1.0)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rows = []
    for number in range(len(work.steps)):
        batches = work.pack(number, micro_tokens)
        began = time.perf_counter()
        stats = train_step(
            model, adapters, optimizer, batches, step=number, num_steps=len(work.steps), max_norm=1.0
        )
        if cuda:
            torch.cuda.synchronize()
        rows.append((time.perf_counter() - began, stats.tokens, stats.loss, stats.grad_norm, len(batches)))
    timed = rows[2:] if len(rows) > 2 else rows
    assert all(row[3] > 0 and math.isfinite(row[3]) for row in rows), "a step without gradient"
    return {
        "seconds_a_step": statistics.median(row[0] for row in timed),
        "tokens_per_s": sum(row[1] for row in timed) / sum(row[0] for row in timed),
        "passes_a_step": timed[0][4],
        "micro_tokens": micro_tokens,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if cuda else None,
        "weights_gb": sum(map(stored_bytes, model.parameters())) / 1e9,
        "bits_a_weight": bits_per_parameter(model),
        "trainable": sum(p.numel() for p in adapters.parameters()),
        "loss": [row[2] for row in rows],
        "grad_norm": [row[3] for row in rows],
        "seconds_to_make_the_model": loaded,
    }


def main() -> None:
    a = arguments()
    device = torch.device("cpu" if a.cpu else "cuda")
    shape = published(a.shape)
    if a.layers:
        shape.num_hidden_layers = a.layers
    work = Steps([examples(a.batch, shape.vocab_size, seed) for seed in range(a.steps)])
    if a.tokens:
        one = [[Made([i % 1000 for i in range(a.tokens)])] for _ in range(a.steps)]
        work = Steps([list(step) for step in one], packing=False)
    results: dict[str, Any] = {}
    for name in a.bases.split(";"):
        config = settings(a, BASES[name])
        gpu = find_gpu("80GB" if a.cpu else None)
        assert gpu is not None
        predictor = Predictor(config, shape, cudnn=gpu.cudnn)
        micro_tokens = a.micro_tokens or choose(predictor, work, gpu, fit=True).tokens
        predicted = predictor.predict(work.batches(micro_tokens))
        results[name] = measure(config, shape, work, micro_tokens, device)
        results[name]["predicted_gb"] = predicted.allocated / 1e9
        row = {k: v for k, v in results[name].items() if not isinstance(v, list)}
        print(name, {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        release()
    record = about(a, device) | {"published_seconds_and_gb_on_an_a100": PUBLISHED, "results": results}
    Path(a.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def release() -> None:
    """Give the memory of a measured model back before the next one is planned."""
    import gc

    from loraloom.kernels.matmul_frozen import release_buffers

    release_buffers()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def about(a: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "what": f"LoRA r = {a.r} on {a.targets} of {a.shape} shapes with random weights, {a.batch} examples a step",
        "command": command_line(),
        "commit": a.commit or commit.stdout.strip(),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "kernels": path_of(device)[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "loraloom")},
    }


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="llama2-7b")
    p.add_argument("--layers", type=int, help="only so many layers, to try it")
    p.add_argument("--bases", default=";".join(BASES))
    p.add_argument("--steps", type=int, default=7)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument(
        "--tokens", type=int, help="instead of Alpaca-like lengths: one example of so many tokens a step"
    )
    p.add_argument("--micro-tokens", type=int, help="instead of the largest that fits")
    p.add_argument("--r", type=int, default=8)
    p.add_argument("--alpha", type=float, default=16)
    p.add_argument("--dropout", type=float, default=0.05)
    p.add_argument("--targets", default="q,v")
    p.add_argument("--optimizer", default="adamw")
    p.add_argument("--recompute", action="store_true")
    p.add_argument("--cpu", action="store_true")
    p.add_argument("--commit", default="", help="where there is no repository to ask")
    p.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "article2.json"))
    return p.parse_args()


if __name__ == "__main__":
    main()
