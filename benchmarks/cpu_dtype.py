"""A training step of the small model on this CPU in float32 and in bfloat16: which one `auto` should choose.

    python benchmarks/cpu_dtype.py

The formats take turns, step by step, so that what else the machine does falls on both. Absolute times mean
little; the ratio is the result. It is written to benchmarks/results/cpu_dtype.json.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from loraloom.config import resolve
from loraloom.packing import pack
from loraloom.step import train_step
from loraloom.workshop import Workshop, build

ROOT = Path(__file__).parents[1]
STEPS = 7


def workshop(dtype: str) -> Workshop:
    settings = {
        "model": "smollm2-135m-instruct",
        "model.dtype": dtype,
        "model.device": "cpu",
        "output": "none",
    }
    settings |= {"data": str(ROOT / "examples" / "support.csv"), "data.eval": 0, "train.batch_size": 8}
    config, _ = resolve(None, settings | {"train.max_steps": STEPS + 1})
    return build(config, progress=False)


def step(shop: Workshop, number: int) -> tuple[float, float, float]:
    """Seconds, loss and gradient norm of one step."""
    examples = [shop.train[i] for i in shop.plan[number]]
    batches = pack(examples, micro_tokens=shop.micro_tokens, packing=True, pad_id=shop.pad_id)
    began = time.perf_counter()
    stats = train_step(
        shop.model, shop.adapters, shop.optimizer, batches, step=number, num_steps=STEPS + 1, max_norm=1.0
    )
    return time.perf_counter() - began, stats.loss, stats.grad_norm


def main() -> None:
    shops = {dtype: workshop(dtype) for dtype in ("float32", "bfloat16")}
    results: dict[str, list[tuple[float, float, float]]] = {dtype: [] for dtype in shops}
    for number in range(STEPS + 1):
        for dtype, shop in shops.items():
            measured = step(shop, number)
            if number:  # the first one warms up
                results[dtype].append(measured)
    seconds = {dtype: statistics.median(row[0] for row in rows) for dtype, rows in results.items()}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    record = {
        "what": "seconds of one training step (8 examples, r = 16 on all linears, AdamW), median",
        "command": "python benchmarks/" + Path(sys.argv[0]).name,
        "commit": commit.stdout.strip(),
        "machine": {
            "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
            "threads": torch.get_num_threads(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "amx": torch.cpu._is_amx_tile_supported(),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "loraloom")},
        "steps": STEPS,
        "seconds": seconds,
        "float32_over_bfloat16": seconds["float32"] / seconds["bfloat16"],
        "loss": {dtype: [row[1] for row in rows] for dtype, rows in results.items()},
        "grad_norm": {dtype: [row[2] for row in rows] for dtype, rows in results.items()},
    }
    path = ROOT / "benchmarks" / "results" / "cpu_dtype.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(
        f"float32 {seconds['float32']:.2f} s, bfloat16 {seconds['bfloat16']:.2f} s a step: "
        f"{record['float32_over_bfloat16']:.2f} times"
    )


if __name__ == "__main__":
    main()
