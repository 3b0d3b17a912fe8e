"""A run of the study: a method trained on the demo's task, and what it came to. method_study.py starts this process.

Tasks come on stdin, a line of JSON each; a result goes to stdout behind a mark, whatever else is printed.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from method_settings import rank_of

from loraloom.config import Source, resolve
from loraloom.data import prepare
from loraloom.dressing import dress
from loraloom.errors import NonFinite
from loraloom.evaluate import choose_tasks, matches, measure
from loraloom.generate import context_length
from loraloom.heldout import held_out
from loraloom.kernels.matmul_frozen import release_buffers
from loraloom.optim import rate_factor, set_rates, warmup_steps
from loraloom.packing import pack
from loraloom.step import train_step
from loraloom.workshop import UNLIMITED, Workshop, build

ROOT = Path(__file__).parents[1]
DATA = ROOT / "runs" / "study"


def options_of(name: str, steps: int) -> dict[str, Any]:
    """A method's own settings where its defaults are made for longer runs or other models."""
    return {"bitfit": {"add_missing": True}, "deltalora": {"start": steps // 4}}.get(name, {})


def run_one(task: dict[str, Any]) -> dict[str, Any]:
    """Train as a task says; what it came to."""
    began = time.perf_counter()
    config, _ = resolve(ROOT / "examples" / "subtraction.yaml", settings(task))
    torch.manual_seed(config.train.seed)
    shop = build(config, offline=True, progress=False)
    started = time.perf_counter()
    curve, seconds, peak = train(shop, task)
    found = {
        "trained": sum(p.numel() for p in shop.adapters.parameters()),
        "start_seconds": started - began,
        "train_seconds": seconds,
        "chosen_by": curve[-1][1],
    }
    if peak:
        found["peak_gb"] = peak / 1e9
    if task["report"]:
        found["curve"] = [[step, float(f"{loss:.5g}")] for step, loss in curve]
        found |= final(shop, task)
    return found


def settings(task: dict[str, Any]) -> dict[str, Any]:
    r, alpha = rank_of(task["method"], 16)
    chosen = {
        "method.name": task["method"],
        "r": r,
        "alpha": alpha,
        "model.dtype": "bfloat16" if torch.cuda.is_available() else "auto",
        "model": task["model"],
        "data.train": str(DATA / "train.jsonl"),
        "data.eval": str(DATA / "choose.jsonl"),
        "output": "none",
        "train.seed": task["seed"],
        "train.max_steps": task["steps"],
        "train.batch_size": task["batch"],
        "train.learning_rate": task["rate"],
    }
    own = options_of(task["method"], task["steps"])
    return chosen | {f"method.{key}": value for key, value in own.items()}


def train(shop: Workshop, task: dict[str, Any]) -> tuple[list[tuple[int, float]], float, int]:
    """All steps, with the loss on the set to choose by every so often; seconds and peak bytes of the steps alone."""
    config, steps = shop.config.train, len(shop.plan)
    eval = [shop.eval[i] for i in range(min(task["choose"], len(shop.eval)))]
    curve, seconds, peak = [(0, loss_of(shop, eval))], 0.0, 0
    cuda = torch.cuda.is_available()
    for step in range(steps):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        warmup = warmup_steps(config.warmup, steps)
        set_rates(shop.optimizer, rate_factor(config.schedule, step, steps, warmup))
        examples = dress(shop.model, [shop.train[i] for i in shop.plan[step]])
        batches = pack(examples, micro_tokens=shop.micro_tokens, packing=shop.packing, pad_id=shop.pad_id)
        train_step(
            shop.model,
            shop.adapters,
            shop.optimizer,
            batches,
            step=step,
            num_steps=steps,
            max_norm=config.max_grad_norm,
        )
        seconds += time.perf_counter() - began
        peak = max(peak, torch.cuda.max_memory_allocated() if cuda else 0)
        if (step + 1) % task["every"] == 0 or step + 1 == steps:
            curve.append((step + 1, loss_of(shop, eval)))
    return curve, seconds, peak


def loss_of(shop: Workshop, examples: Any) -> float:
    shop.adapters.eval()
    with shop.adapters.hold():
        found = held_out(
            shop.model, examples, pad_id=shop.pad_id, micro_tokens=shop.micro_tokens, packing=shop.packing
        )
    shop.adapters.train()
    return found.mean


def final(shop: Workshop, task: dict[str, Any]) -> dict[str, Any]:
    """Loss and exact match on the final set, of the tuned model; and of the base, if the task asks."""
    data = shop.config.data.model_copy(
        update={"train": [Source(path=str(DATA / "final.jsonl"))], "eval": 0.0, "duplicates": "keep"}
    )
    limit = context_length(shop.model) or UNLIMITED
    every = prepare(data, shop.tokenizer, model_max_length=limit, progress=False).train
    examples = [every[i] for i in range(min(task["final"], len(every)))]
    tasks = choose_tasks(shop.tokenizer, examples, len(examples), limit)
    for_loss = {"pad_id": shop.pad_id, "micro_tokens": shop.micro_tokens, "packing": shop.packing}
    for_answers = {
        "pad_id": shop.pad_id,
        "stop_ids": shop.stop_ids,
        "max_new_tokens": 8,
        "batch_tokens": 16384,
    }
    shop.adapters.eval()
    found = {}
    for key in ("", "base_") if task["base"] else ("",):
        if key:
            shop.adapters.use()
        side = measure(shop.model, shop.tokenizer, examples, tasks, for_loss, for_answers, lambda count: None)
        right = matches(tasks, side)
        found |= {f"{key}loss": side.loss.mean, f"{key}exact_match": sum(right) / len(right)}
    return found


def worker() -> None:
    """Tasks on stdin, a line each; results on stdout, each behind a mark."""
    for line in sys.stdin:
        try:
            found = run_one(json.loads(line))
        except NonFinite as error:
            found = {"diverged": error.message}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        gc.collect()
        release_buffers()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    worker()
