"""LoRA against QLoRA on a real model: held-out loss and exact match of the demo's task over seeds.

    python examples/subtraction.py runs/subtraction
    python benchmarks/qlora_quality.py               the runs one after the other; --jobs 5 where there is room

SmolLM2-135M-Instruct, two-digit subtraction, examples/subtraction.yaml: r = 16 on all linears, 120 steps of 32, with
the base in bf16, NF4 and FP4, each with three seeds (of the adapter's start and the order of the data). The
commands are the user's own, `loraloom train` and `loraloom eval`. Written to
benchmarks/results/qlora_quality.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from command_line import command_line

ROOT = Path(__file__).parents[1]
BASES = {
    "bf16": ["model.quantize=none"],
    "nf4, double": ["model.quantize=nf4"],
    "nf4": ["model.quantize=nf4", "model.double_quant=false"],
    "fp4, double": ["model.quantize=fp4"],
    "e2m1, double": ["model.quantize=e2m1"],
}


def call(*words: str) -> str:
    command = [sys.executable, "-m", "loraloom", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"CI": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout


def one(base: str, seed: int, a: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one run with the commands of the command line."""
    run = ROOT / "runs" / f"quality-{base.replace(', ', '-')}-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    chosen = [*BASES[base], f"train.seed={seed}", "model.dtype=bfloat16", *a.set]
    flags = [f"--set={one}" for one in chosen]
    call("train", "examples/subtraction.yaml", "-o", str(run), "--offline", *flags)
    result = json.loads(call("eval", str(run), "--answers", str(a.answers), "--offline", "--json"))
    state = json.loads((run / "run.json").read_text(encoding="utf-8"))
    rows = {row["metric"]: row for row in result["rows"]}
    found = {"base": base, "seed": seed, "seconds": state["seconds"]}
    found |= {
        f"{name.replace(' ', '_')}_{side}": rows[name][side]["value"]
        for name in rows
        for side in ("base", "tuned")
    }
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bases", default=";".join(BASES))
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--jobs", type=int, default=1, help="runs at once")
    p.add_argument("--answers", type=int, default=500)
    p.add_argument(
        "--set", action="append", default=[], help="settings of every run, such as train.max_steps=2"
    )
    p.add_argument("--commit", default="", help="where there is no repository to ask")
    p.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "qlora_quality.json"))
    a = p.parse_args()
    tasks = [(base, seed) for seed in range(a.seeds) for base in a.bases.split(";")]
    with ThreadPoolExecutor(a.jobs) as pool:
        runs = list(pool.map(lambda task: one(*task, a), tasks))
    metrics = [key for key in runs[0] if key.endswith(("_base", "_tuned"))]
    table = {
        base: {
            key: {"mean": statistics.mean(found), "lowest": min(found), "highest": max(found)}
            for key in metrics
            if (found := [run[key] for run in runs if run["base"] == base])
        }
        for base in a.bases.split(";")
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    record = {
        "what": "two-digit subtraction, SmolLM2-135M-Instruct, examples/subtraction.yaml",
        "command": command_line(),
        "commit": a.commit or commit.stdout.strip(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "runs_at_once": a.jobs,
        "versions": {name: version(name) for name in ("torch", "transformers", "loraloom")},
        "table": table,
        "runs": runs,
    }
    Path(a.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
