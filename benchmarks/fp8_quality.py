"""What products in 8-bit floats change on a real model: the first step's gradients, and what a short training comes to.

    python benchmarks/fp8_quality.py                                       SmolLM2-135M-Instruct, NF4; GPU or CPU
    python benchmarks/fp8_quality.py --model FOLDER --steps 2 --seeds 1    to try it

Two-digit subtraction as in examples/subtraction.yaml: r = 16 on all linears, 32 sums a step. The same NF4 base with
model.fp8 off and on: cosine of the adapter's gradients at the first step, over all tensors and for each (A's are zero
then, as B is); then the loss and the exact match of held-out sums after training, for each seed. On a CPU the products
are emulated, which is slow and gives the same numbers. Written to benchmarks/results/speed_fp8_quality.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from command_line import command_line
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples")]
OUT = ROOT / "benchmarks" / "results" / "speed_fp8_quality.json"


def settings(a: argparse.Namespace, fp8: bool, seed: int) -> dict[str, str]:
    """Of one run, as on the command line."""
    chosen = {
        "model": a.model,
        "model.dtype": a.dtype,
        "model.quantize": a.quantize,
        "model.fp8": str(fp8).lower(),
        "data.train": str(Path(a.folder) / "train.jsonl"),
        "data.eval": str(Path(a.folder) / "held-out.jsonl"),
        "train.max_steps": str(a.steps),
        "train.batch_size": str(a.batch),
        "train.seed": str(seed),
        "eval.every": str(a.steps),
    }
    return chosen | dict(one.split("=", 1) for one in a.set)


def first_gradients(a: argparse.Namespace, fp8: bool) -> dict[str, Tensor]:
    """The adapter's gradients in the first step of seed 0, by name."""
    from loraloom.config import resolve
    from loraloom.packing import pack
    from loraloom.step import train_step
    from loraloom.workshop import build

    chosen: dict[str, Any] = settings(a, fp8, seed=0) | {"output": "none", "model.fp8": fp8}
    config, _ = resolve(ROOT / "examples" / "subtraction.yaml", chosen)
    shop = build(config, offline=True, progress=False)
    check_products(shop.model, fp8)
    batches = pack(
        [shop.train[i] for i in shop.plan[0]],
        micro_tokens=shop.micro_tokens,
        packing=shop.packing,
        pad_id=shop.pad_id,
    )
    found: dict[str, Tensor] = {}

    def keep() -> None:
        for name, p in shop.adapters.named_parameters():
            if p.grad is not None and bool(p.grad.any()):
                found[name] = p.grad.detach().double().cpu().flatten()

    train_step(
        shop.model,
        shop.adapters,
        shop.optimizer,
        batches,
        step=0,
        num_steps=1,
        max_norm=None,
        inspect=keep,
    )
    return found


def check_products(model: Any, fp8: bool) -> None:
    """raises  SystemExit if the model's products are not what was asked for: the comparison would be empty"""
    taken = sum(bool(getattr(p, "fp8", False)) for p in model.parameters())
    if bool(taken) != fp8:
        raise SystemExit(f"model.fp8={fp8}, and {taken} weights are multiplied in fp8")


def cosines(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Between two sets of gradients: over all, and the lowest and the median of the tensors."""
    if one.keys() != other.keys():
        raise ValueError("the two steps gave gradients to different tensors")
    each = {name: cosine(one[name], other[name]) for name in one}
    names = sorted(one)
    overall = cosine(torch.cat([one[n] for n in names]), torch.cat([other[n] for n in names]))
    return {
        "overall": overall,
        "median": statistics.median(each.values()),
        "lowest": min(each.values()),
        "lowest_in": min(each, key=lambda name: each[name]),  # type: ignore[dict-item]
        "tensors": len(each),
        "norm_ratio": float(
            torch.cat([other[n] for n in names]).norm() / torch.cat([one[n] for n in names]).norm()
        ),
    }


def cosine(x: Tensor, y: Tensor) -> float:
    return float(x @ y / (x.norm() * y.norm()))


def trained(a: argparse.Namespace, fp8: bool, seed: int) -> dict[str, Any]:
    """Train and evaluate with the user's own commands."""
    run = Path(a.folder) / f"fp8-{fp8}-{seed}"
    subprocess.run(["rm", "-rf", str(run)], check=True)
    chosen = settings(a, fp8, seed)
    flags = [f"--set={key}={value}" for key, value in chosen.items()]
    call("train", "examples/subtraction.yaml", "-o", str(run), "--offline", *flags)
    result = json.loads(call("eval", str(run), "--answers", str(a.answers), "--offline", "--json"))
    rows = {row["metric"]: row["tuned"]["value"] for row in result["rows"]}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [one for one in lines if one["kind"] == "train"]
    last = steps[-min(5, len(steps)) :]
    found = {
        "fp8": fp8,
        "seed": seed,
        "loss": rows["loss"],
        "exact_match": rows["exact match"],
        "train_loss": statistics.mean(one["loss"] for one in last),
        "seconds": sum(one["seconds"] for one in steps),
    }
    print(json.dumps(found), flush=True)
    return found


def call(*words: str) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "loraloom", *words]
    env = os.environ | {"CI": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2-135m-instruct")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--quantize", default="nf4")
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--answers", type=int, default=200)
    p.add_argument("--gradients", action="store_true", help="only the gradients of the first step")
    p.add_argument("--set", action="append", default=[], help="more settings of every run")
    p.add_argument("--folder", default=str(ROOT / "runs" / "fp8-quality"))
    p.add_argument("--commit", default="", help="where there is no repository to ask")
    p.add_argument("--out", default=str(OUT))
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    import subtraction

    a = arguments(argv)
    subtraction.main(Path(a.folder))
    found = cosines(*(first_gradients(a, fp8) for fp8 in (False, True)))
    print(json.dumps(found), flush=True)
    own = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    runs: list[dict[str, Any]] = []
    record = {
        "what": f"two-digit subtraction, {Path(a.model).name}, {a.quantize}, {a.steps} steps of {a.batch}",
        "command": command_line(),
        "commit": a.commit or own.stdout.strip(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "gradients": found,
        "runs": runs,
    }
    write(record, Path(a.out))
    for seed in range(0 if a.gradients else a.seeds):
        runs += [trained(a, fp8, seed) for fp8 in (False, True)]
        write(record, Path(a.out))  # pairs that are there stay, if what is left takes too long
    return record


def write(record: dict[str, Any], out: Path) -> None:
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
