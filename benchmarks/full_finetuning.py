"""LoRA beside full fine-tuning on one GPU: peak memory and tokens a second, at 1B shapes with random weights.

    python benchmarks/full_finetuning.py
    python benchmarks/full_finetuning.py --cpu --layers 2 --steps 3 --batch 2 --length 32     to try it

Article 3 has a third of the memory (1.2 TB against 350 GB, GPT-3 with Adam) and 43.1 tokens/s where full fine-tuning
has 32.5 (section 4.2: 25 % less time a token). Here: LoRA as there, r = 4 on q and v; LoRA as we train, r = 16 on all
linear layers; and full fine-tuning as methods/full.py does it, in float32 copies beside the frozen base in bf16: 18
bytes a weight with gradients and AdamW's moments, where mixed precision without that base has 16. The same batches,
AdamW, nothing recomputed unless asked for; each setting in a process of its own, so that one's memory is not
another's. Written to benchmarks/results/full_finetuning.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from article2 import Steps, about, measure
from command_line import command_line

from loraloom.config import RunConfig, resolve
from loraloom.memory import Predictor
from loraloom.shapes import published
from loraloom.workload import Made

OUT = Path(__file__).parent / "results" / "full_finetuning.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA, r = 4 on q, v": {"r": 4, "target_modules": ["q", "v"]},
    "LoRA, r = 16 on all linear layers": {"r": 16, "target_modules": ["all-linear"]},
    "full fine-tuning": {"method": "full"},
}
FULL = "full fine-tuning"
PAPER = {"memory_bytes": {FULL: 1.2e12, "LoRA": 350e9}, "tokens_per_s": {FULL: 32.5, "LoRA": 43.1}}


def config_of(a: argparse.Namespace, name: str) -> RunConfig:
    given = {"model": a.shape, "model.dtype": "bfloat16", "model.device": "cpu" if a.cpu else "cuda"}
    given |= {"data": "none", "output": "none", "train.recompute": "full" if a.recompute else "none"}
    return resolve(None, given | SETTINGS[name])[0]


def one(a: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train a few steps; the numbers of article2.measure with the predicted peak."""
    shape = published(a.shape)
    if a.layers:
        shape.num_hidden_layers = a.layers
    rows = [[Made([(7 * i + row) % 1000 for i in range(a.length)]) for row in range(a.batch)]] * a.steps
    work, tokens = Steps([list(step) for step in rows], packing=False), a.batch * a.length
    config = config_of(a, name)
    found = measure(config, shape, work, tokens, torch.device("cpu" if a.cpu else "cuda"))
    cudnn = not a.cpu and torch.cuda.get_device_capability()[0] >= 9
    found["predicted_gb"] = (
        Predictor(config, shape, cudnn=cudnn).predict(work.batches(tokens)).allocated / 1e9
    )
    return found


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Full fine-tuning's memory over a setting's, and a setting's speed over full fine-tuning's."""
    full = results[FULL]
    memory = "peak_gb" if full["peak_gb"] is not None else "predicted_gb"
    return {
        name: {
            "times_less_memory": full[memory] / row[memory],
            "times_the_speed": row["tokens_per_s"] / full["tokens_per_s"],
        }
        for name, row in results.items()
        if name != FULL
    }


def main() -> None:
    a = arguments()
    if a.only:
        print("RESULT " + json.dumps(one(a, a.only)), flush=True)
        return
    results = {}
    for name in SETTINGS:
        command = [sys.executable, *sys.argv, "--only", name]
        done = subprocess.run(command, capture_output=True, text=True)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if line is None:
            sys.exit(f"{name}: {done.stderr[-3000:]}")
        results[name] = json.loads(line.removeprefix("RESULT "))
        row = {k: v for k, v in results[name].items() if not isinstance(v, list)}
        print(name, {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    device = torch.device("cpu" if a.cpu else "cuda")
    record = about(a, device) | {
        "what": f"{a.shape} shapes with random weights, steps of {a.batch} rows of {a.length} tokens",
        "command": command_line(),
        "paper": PAPER,
        "ratios": ratios(results),
        "results": results,
    }
    a.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record["ratios"], indent=1))


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="llama3.2-1b")
    p.add_argument("--layers", type=int, help="only so many layers, to try it")
    p.add_argument("--steps", type=int, default=12)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=2048)
    p.add_argument("--recompute", action="store_true")
    p.add_argument("--cpu", action="store_true")
    p.add_argument("--only", choices=SETTINGS, help="one setting, in this process; prints its numbers")
    p.add_argument("--commit", default="", help="where there is no repository to ask")
    p.add_argument("--out", type=Path, default=OUT)
    a = p.parse_args()
    a.r, a.targets = None, "several"  # what article2.about would name
    return a


if __name__ == "__main__":
    main()
