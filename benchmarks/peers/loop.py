"""The timed loop of the side-by-side benchmarks and their JSON lines.

A peer is a class with `name`, `site` (folders of carried packages), `build(a)`, `loss(batch)` and `model`; where it has
them, these are used too:

  prepare(batch, r)     a batch as the peer wants it, made before the clock runs
  set_checkpoint(mode)  switch recomputation on a built model; without it the model is built anew
  step(batch)           a whole optimizer step of its own: (loss, gradient norm); then also trained(), without_grad.
                        Else the kit's: forward, loss, backward, torch's fused AdamW on whatever trains
  about()               more for the JSON line
  variants(a)           several settings to run in one process
  release()             give back what outlives a model
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import kit


class PlainStep:
    """One optimizer step of a peer that has none of its own."""

    def __init__(self, peer: Any, device: str) -> None:
        import torch

        self.peer = peer
        self.params = [p for p in peer.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, weight_decay=0.0, fused=device == "cuda")
        self.without_grad = 0

    def __call__(self, batch: Any) -> Any:
        loss = self.peer.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach().float()

    def norm(self, batch: Any) -> float:
        """The gradient's L2 norm; no weight moves. Outside of the clock."""
        import torch

        self.peer.loss(batch).backward()
        grads = [p.grad.float() for p in self.params if p.grad is not None]
        self.without_grad = len(self.params) - len(grads)
        self.optimizer.zero_grad(set_to_none=True)
        return float(torch.stack([g.norm() for g in grads]).norm())


class OwnStep:
    """The step of a peer that brings one, which clips and so knows its gradient norm."""

    def __init__(self, peer: Any, device: str) -> None:
        self.peer, self.norms = peer, list[Any]()  # read when all is over
        self.params = [p for p in peer.model.parameters() if p.requires_grad] + list(peer.trained())

    def __call__(self, batch: Any) -> Any:
        loss, norm = self.peer.step(batch)
        self.norms.append(norm)
        return loss

    @property
    def without_grad(self) -> int:
        return self.peer.without_grad


def measure(peer: Any, a: argparse.Namespace, r: argparse.Namespace) -> dict[str, Any]:
    """Warm up, then time at least a.steps steps and a.seconds; the numbers of a JSON line."""
    import torch

    cuda = a.device == "cuda"
    batches = kit.make_batches(a, r)
    if hasattr(peer, "prepare"):
        batches = [peer.prepare(b, r) for b in batches]
    own = hasattr(peer, "step")
    step: Any = OwnStep(peer, a.device) if own else PlainStep(peer, a.device)
    first_norm = None if own else step.norm(batches[0])
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    used, marks, losses = run(step, batches, a.warmup, a.seconds, cuda, replays=getattr(peer, "replay", None))
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    reserved = torch.cuda.max_memory_reserved() if cuda else 0
    ms = [apart(x, y, cuda) for x, y in pairwise(marks)][a.warmup :]
    timed = used[a.warmup :]
    losses = [float(x) for x in losses]
    real = sum(b["real"] for b in timed)
    return {
        "tokens_per_s": round(1e3 * real / sum(ms), 1),
        "step_ms": round(statistics.median(ms), 3),
        "step_ms_min": round(min(ms), 3),
        "step_ms_max": round(max(ms), 3),
        "sustained_s": round(sum(ms) / 1e3, 2),
        "timed_steps": len(ms),
        "real_tokens_per_step": round(real / len(ms), 1),
        "pad_fraction": round(1 - real / sum(b["slots"] for b in timed), 4),
        "peak_mem_gb": round(peak / 1e9, 3) if cuda else None,
        "peak_reserved_gb": round(reserved / 1e9, 3) if cuda else None,
        "loss0": finite(losses[0]),
        "lossN": finite(losses[-1]),
        "grad_norm0": finite(float(step.norms[0]) if own else first_norm),
        "grad_normN": finite(float(step.norms[-1]) if own else step.norm(used[-1])),
        "finite": all(map(math.isfinite, losses)),
        "params_without_grad": step.without_grad,
        "trainable_params": sum(p.numel() for p in step.params),
        "adapter_dtype": str(step.params[0].dtype).removeprefix("torch."),
    }


def run(
    step: Callable[[Any], Any],
    batches: list[Any],
    warmup: int,
    seconds: float,
    cuda: bool,
    replays: Any = None,
) -> tuple[list[Any], list[Any], list[Any]]:
    """Every batch once, and those after the warm-up again until the timed steps took `seconds`.

    Returns the batches taken, a time stamp before each step and after the last, and the losses. One step may be under
    way on the GPU while the next is queued, as in training. Steps that are replayed allocate nothing: what they need
    is counted when they are recorded, so there the peak is that of the warm-up too.
    """
    import torch

    used, marks, losses = [], [], []
    timed = batches[warmup:]
    while len(used) < len(batches) or apart(marks[warmup], marks[-1], cuda, wait=True) < 1e3 * seconds:
        number = len(used)
        if number == warmup and cuda:
            torch.cuda.synchronize()
            if not replays:
                torch.cuda.reset_peak_memory_stats()
        marks.append(stamp(cuda))
        batch = batches[number] if number < warmup else timed[(number - warmup) % len(timed)]
        losses.append(step(batch))
        used.append(batch)
    marks.append(stamp(cuda))
    if cuda:
        torch.cuda.synchronize()
    return used, marks, losses


def stamp(cuda: bool) -> Any:
    import torch

    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def apart(x: Any, y: Any, cuda: bool, wait: bool = False) -> float:
    """Milliseconds from one time stamp to another."""
    if not cuda:
        return 1e3 * (y - x)
    if wait:
        y.synchronize()
    return x.elapsed_time(y)


def finite(x: float) -> float | None:
    return round(x, 5) if math.isfinite(x) else None


def main(cls: Any, p: argparse.ArgumentParser | None = None, argv: list[str] | None = None) -> None:
    """Every run of every variant of a peer; one JSON line each, also for those that fail."""
    a = kit.parse(p or kit.parser(), argv)
    kit.use_site(*cls.site)
    for variant in cls.variants(a) if hasattr(cls, "variants") else [a]:
        runs(cls, variant)


def runs(cls: Any, a: argparse.Namespace) -> None:
    import torch

    peer: Any = None
    built = None
    for r in a.runs:
        began, record = time.time(), {"peer": cls.name}
        try:
            switch = getattr(peer, "set_checkpoint", None)
            if peer is not None and built != r.checkpoint and not (switch and switch(r.checkpoint)):
                peer = None
            if peer is None:
                clean()
                getattr(cls, "release", clean)()
                if a.device == "cuda":  # not 0: an earlier run leaked
                    record["left_over_gb"] = round(torch.cuda.memory_allocated() / 1e9, 3)
                a.checkpoint, a.run = r.checkpoint, r
                peer = cls()
                peer.build(a)
                clean()
            built = r.checkpoint
            ready = time.time()
            record |= measure(peer, a, r)
            record |= {"build_s": round(ready - began, 1), "run_s": round(time.time() - ready, 1)}
        except Exception as error:  # whatever goes wrong with a peer stands in its line
            traceback.print_exc()
            words = str(error).strip().splitlines() or [""]
            record["error"] = f"{type(error).__name__}: {words[0][:300]}"
        print(json.dumps(record | about(a, r, peer, "error" not in record)), flush=True)
        if "error" in record:
            peer = None  # built anew for the next run
        clean()


def about(a: argparse.Namespace, r: argparse.Namespace, peer: Any, ran: bool) -> dict[str, Any]:
    """The settings of a line."""
    import torch

    found = {
        "versions": kit.versions(),
        "device": torch.cuda.get_device_name() if a.device == "cuda" and torch.cuda.is_available() else "cpu",
        "attn": getattr(peer, "attn_used", a.attn),
        "note": " ".join(filter(None, (a.note, getattr(peer, "note", "")))),
    }
    found |= {key: getattr(a, key) for key in ("model", "quant", "rank", "targets", "compile", "autocast")}
    found |= {key: getattr(a, key) for key in ("recompute", "fp8", "fast", "xformers") if hasattr(a, key)}
    found |= {key: getattr(r, key) for key in ("batch", "seq", "checkpoint", "data", "packing")}
    return found | (peer.about() if ran and hasattr(peer, "about") else {})


def clean() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
