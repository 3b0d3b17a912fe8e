"""A run folder with made-up numbers, for the tests of what reads one."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from loraloom.config import resolve
from loraloom.files import write_json
from loraloom.rundir import Run

STEPS = 120
MODULES = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)> & $a_b$'


def make_run(path: Path, settings: dict[str, Any] | None = None) -> Run:
    """A run that has only been created."""
    given = {"model": "org/small-model", "data": "tickets.csv", "output": str(path)} | (settings or {})
    config, origins = resolve(settings=given)
    argv = ["/usr/bin/loraloom", "train", "-m", "org/small-model", "-d", "tickets.csv", "-o", path.name]
    env = {"device": "cpu", "dtype": "float32", "reason": "the CPU computes best in float32"}
    return Run.create(path, config, origins, argv, **env)


def finished_run(
    path: Path, settings: dict[str, Any] | None = None, *, floor: float = 1.1, seed: int = 0
) -> Run:
    """A run with everything that a run can leave behind."""
    run = make_run(path, settings)
    noise = random.Random(seed)
    base = 2.904
    for step in range(STEPS + 1):
        expected = floor + (base - floor) * math.exp(-step / 25)
        if step % 20 == 0:
            held = expected + 0.05 + max(0, step - 100) * 0.002
            record = {
                "kind": "eval",
                "step": step,
                "loss": base if not step else held,
                "tokens": 900,
                "seconds": 0.8,
            }
            run.log(record)
            for prompt in ("How do I reset my PIN?", "Where is my order?"):
                answer = (
                    "I do not know what you mean"
                    if step < 40
                    else "Open Settings, choose Security, then PIN."
                )
                reference = "Open Settings, then Security."
                run.sample(
                    {
                        "step": step,
                        "prompt": prompt,
                        "answer": answer,
                        "reference": reference,
                        "stopped": step > 0,
                    }
                )
        if step:
            rate = 2e-4 * min(1, step / 5) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
            run.log(
                {
                    "kind": "train",
                    "step": step,
                    "loss": expected + noise.gauss(0, 0.12),
                    "grad_norm": 0.4 + 2 * math.exp(-step / 10) + abs(noise.gauss(0, 0.1)),
                    "lr": rate,
                    "tokens": 2048 + noise.randrange(-200, 200),
                    "targets": 700,
                    "seconds": 0.22 + noise.random() * 0.03 + (0.6 if step == 1 else 0),
                    "memory": int(8.7 * 2**30) - (2**30 if step < 3 else 0),
                }
            )
    held_records = run.metrics("eval")
    best = min(held_records, key=lambda record: record["loss"])
    run.update(
        status="done",
        finished="2026-11-22T09:20:11+00:00",
        seconds=371.0,
        steps=STEPS,
        step=STEPS,
        best={"step": best["step"], "loss": best["loss"]},
        base_loss=base,
        trainable=10_100_000,
        total=606_000_000,
        message="",
    )
    checks = [
        ("rows with targets", "12 402 of 12 402 rows carry loss"),
        ("every adapter moved", "196 of 196 have a gradient and a change"),
        ("better than the base", "1.187 against 2.904"),
        ("adapter reads back", "the saved adapter gives the same logits, largest difference 0"),
        ("no non-finite number", "losses, gradients and weights stayed finite"),
    ]
    for name, detail in checks:
        run.add_check(name, True, detail)
    write_extras(run)
    return run


def write_extras(run: Run) -> None:
    """Evaluation, data report, adapter summary and merge verification."""
    write_json(run.path / "eval" / "held-out.json", evaluation())
    write_json(
        run.path / "data" / "manifest.json",
        {
            "sources": [
                {
                    "path": "tickets.csv",
                    "use": "train",
                    "format": "prompt_completion",
                    "read": 12431,
                    "kept": 12402,
                }
            ],
            "problems": [
                {
                    "kind": "empty answer",
                    "effect": "dropped",
                    "count": 21,
                    "rows": ["tickets.csv:7", "tickets.csv:90"],
                },
                {"kind": "duplicate", "effect": "dropped", "count": 8, "rows": ["tickets.csv:12"]},
            ],
            "read": 12431,
            "kept": 12402,
            "lengths": {"min": 9, "median": 118, "mean": 141.2, "p99": 611, "max": 4902},
            "max_length": 640,
            "too_long": "drop",
            "target_share": 0.314,
            "notes": ["the columns question and answer were taken for prompt and completion"],
            "length_histogram": {
                "edges": [0, 64, 128, 192, 256, 320, 384],
                "counts": [410, 5200, 4100, 1700, 700, 240, 52],
            },
        },
    )
    layers = []
    for layer in range(6):
        for part, names in MODULES.items():
            for place, name in enumerate(names):
                delta = 0.4 * (1 + layer) * (1 + place) / (2 if part == "mlp" else 1)
                layers.append(
                    {
                        "name": f"model.layers.{layer}.{part}.{name}",
                        "r": 16,
                        "alpha": 32,
                        "norm_A": 3.1,
                        "norm_B": 0.7 * delta,
                        "norm_delta": 0.0 if (layer, name) == (2, "v_proj") else delta,
                        "norm_W": 61.5,
                    }
                )
    write_json(run.path / "adapter" / "summary.json", {"layers": layers})
    write_json(
        run.path / "merge.json",
        {"prompts": 32, "top1_agreement": 0.998, "mean_kl": 4.1e-5, "max_logit_difference": 0.021},
    )


def evaluation() -> dict[str, Any]:
    """A table as `loraloom eval` writes it."""

    def row(metric: str, unit: str, base: float, tuned: float, error: float, verdict: str) -> dict[str, Any]:
        return {
            "metric": metric,
            "unit": unit,
            "items": 620,
            "lower_is_better": unit == "nats/token",
            "base": {"value": base, "stderr": error},
            "tuned": {"value": tuned, "stderr": error},
            "change": tuned - base,
            "change_stderr": 1.3 * error,
            "verdict": verdict,
        }

    right, wrong = "Open Settings, then Security.", "I do not know."
    cases = [(False, True), (True, False), (False, False), (True, True)]
    return {
        "name": "held-out",
        "created": "2026-11-22T09:25:00+00:00",
        "settings": {
            "examples": 620,
            "rows": "sha256:0123456789abcdef",
            "answers": 620,
            "max_new_tokens": 64,
        },
        "rows": [
            row("loss", "nats/token", 2.904, 1.187, 0.021, "better"),
            row("exact match", "share", 0.121, 0.643, 0.019, "better"),
            row("stopped", "share", 0.412, 0.371, 0.011, "worse"),
            row("choice accuracy", "share", 0.428, 0.433, 0.015, "within noise"),
        ],
        "examples": [
            {
                "row": f"tickets.csv:{17 + place}",
                "prompt": f"How do I reset my PIN, case {place}?",
                "reference": right,
                "base": right if base else wrong,
                "tuned": right if tuned else wrong,
                "base_ok": base,
                "tuned_ok": tuned,
            }
            for place, (base, tuned) in enumerate(cases)
        ],
    }
