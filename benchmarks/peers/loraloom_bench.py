"""loraloom itself: its own model class on random weights, its adapters, its packing.Batch and its train_step.

Every setting is that of `loraloom train`: the optimizer is loraloom.optim's, gradients are clipped at 1. --variants
runs several settings in one process, `;` between them, each as QUANT[,key=value ...]:

    --variants "none;nf4;nf4,fp8=off;nf4,recompute=full"
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import kit
import loop

ROOT = Path(__file__).parents[2]
KEYS = {
    "fp8": ["auto", "on", "off"],
    "fast": ["auto", "on", "off"],
    "graphs": ["auto", "on", "off"],
    "recompute": ["none", "gate_up", "full", "offload"],
    "attention": ["auto", "varlen", "sdpa"],
}
CHOICES = KEYS | {"compile": list(kit.ONOFF)}  # of --variants
BOOL = {"auto": "auto", "on": True, "off": False}
FOREVER = 1_000_000  # steps of the run that this would be


def parser() -> argparse.ArgumentParser:
    p = kit.parser()
    for key, choices in KEYS.items():
        default = "none" if key == "recompute" else "auto"
        p.add_argument(f"--{key}", default=default, choices=choices)
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--variants", default="", help="QUANT[,key=value ...] and so on, with ; between them")
    return p


class Late:
    """A step whose numbers may still be on their way."""

    def __init__(self, queued: Any) -> None:
        self.queued, self.stats = queued, None

    def settle(self) -> Any:
        if self.stats is None:
            self.stats = self.queued.settle()
        return self.stats


class Number:
    """A number of such a step, for who waits for it."""

    def __init__(self, late: Late, name: str) -> None:
        self.late, self.name = late, name

    def __float__(self) -> float:
        return float(getattr(self.late.settle(), self.name))


class Loraloom:
    name, site = "loraloom", ()

    @staticmethod
    def variants(a: argparse.Namespace) -> list[argparse.Namespace]:
        """The settings of --variants, or the one of the flags."""
        found = []
        for words in filter(None, a.variants.split(";")):
            quant, *pairs = words.strip().split(",")
            one = copy.deepcopy(a)
            one.quant = quant
            for key, value in (pair.split("=") for pair in pairs):
                if value not in CHOICES.get(key, [value]) or not hasattr(a, key):
                    raise SystemExit(f"--variants: there is no {key}={value}")
                setattr(one, key, type(getattr(a, key))(value))
            found.append(one)
        return found or [a]

    def build(self, a: argparse.Namespace) -> None:
        """Model, adapters and optimizer as a run's first step finds them."""
        import torch
        from random_weights import random_model

        from loraloom.adapt import Adapters
        from loraloom.optim import make_optimizer, set_rates
        from loraloom.workshop import spec_of

        self.a, self.notes, self.number, self.without_grad = a, list[str](), 0, 0
        self.last: Late | None = None
        self.recompute = "full" if a.checkpoint != "off" and a.recompute == "none" else a.recompute
        config = self.config = settings(a, self.recompute)
        device = self.device = torch.device(a.device)
        table = None if a.quant == "none" else a.quant
        self.model = random_model(kit.hf_config(a), device=device, table=table)
        self.attention(config.model.attention)
        self.products(config)
        self.adapters = Adapters(self.model)
        self.adapters.add("default", spec_of(config))
        self.fused(a.fast)
        self.recomputing()
        self.compiled()
        self.adapters.train()
        self.optimizer = make_optimizer(self.adapters.groups(1e-4), config.train)
        set_rates(self.optimizer, 1.0)
        self.replay: Any = None  # CUDA graphs, once a batch has shown how long passes are
        self.chosen = False

    def attention(self, wanted: str) -> None:
        import torch

        self.attn_used = "sdpa"
        if settle := self.has("model", "settle_attention"):
            self.attn_used = settle(self.model, wanted, self.device, torch.bfloat16)

    def products(self, config: Any) -> None:
        """Products in fp8 where the settings ask for them."""
        if config.model.quantize == "none":
            return
        if use_fp8 := self.has("products8", "use_fp8"):
            self.notes += use_fp8(self.model, config.model.fp8, self.device)

    def recomputing(self) -> None:
        if self.recompute == "none":
            return
        if apply := self.has("recompute", "apply"):
            apply(self.model, self.adapters, self.recompute)
        elif self.recompute == "full":
            self.has("workshop", "checkpoint_layers")(self.model)
        else:
            raise SystemExit(f"this version has no recompute={self.recompute}")

    def compiled(self) -> None:
        """Layers through torch's compiler: --compile on, as train.compile does."""
        if self.a.compile == "off":
            return
        from loraloom.skeleton import decoder_layers

        if compiled := self.has("compiling", "compile_layers"):
            self.notes.append(compiled(list(decoder_layers(self.model) or ()), self.device))

    def fused(self, wanted: str) -> None:
        """Fused decoder layers, before any is recomputed; a line for each kind that is taken or is not."""
        if wanted == "off" or (wanted == "auto" and self.device.type != "cuda"):
            return
        if engage := self.has("fast", "engage"):
            self.notes += engage(
                self.adapters, recompute="gate_up" if self.recompute == "gate_up" else "none"
            )

    def has(self, module: str, name: str) -> Any:
        """A function of loraloom; None, and a note, in a version that has none: earlier commits are measured too."""
        if importlib.util.find_spec(f"loraloom.{module}") is not None:
            own = getattr(importlib.import_module(f"loraloom.{module}"), name, None)
            if own is not None:
                return own
        self.notes.append(f"no {module}.{name} in this version")
        return None

    def prepare(self, b: dict[str, Any], r: argparse.Namespace) -> dict[str, Any]:
        """The kit's batch as packing makes one: documents in one row, or one a row."""
        from loraloom.packing import batch, rounded
        from loraloom.workload import Made

        ids = b["ids"].cpu()
        if b["lens"]:
            parts = [one.tolist() for one in ids[0].split(b["lens"])]
            made = batch([list(enumerate(map(Made, parts)))], 0, length=rounded(ids.numel()))
        else:
            widths = b.get("widths") or [ids.shape[1]] * len(ids)
            parts = [row[:width].tolist() for row, width in zip(ids, widths)]
            if len(set(widths)) == 1:  # packing puts them in one line
                made = batch([list(enumerate(map(Made, parts)))], 0, length=ids.numel())
            else:
                made = batch([[(n, Made(part))] for n, part in enumerate(parts)], 0)
        made = self.recorded(made)
        return {"batch": made.to(self.device), "real": b["real"], "slots": made.ids.numel()}

    def recorded(self, made: Any) -> Any:
        """A batch as CUDA graphs take it, where a run of such batches would have them."""
        make, reason = self.has("graphs", "make_graphs"), self.has("graphs", "graph_reason")
        if not make or not reason or made.position is None:
            return made
        if not self.chosen:
            self.chosen = True
            why = reason(self.adapters, self.config, self.model, self.device)
            wish = self.config.train.graphs
            self.replay, words = make(wish, why, self.device, pad_id=0, tokens=made.ids.numel())
            self.notes.append(f"graphs {'on' if self.replay else 'off'}: {words}")
        return made if self.replay is None else self.replay.pad(made)

    def step(self, b: dict[str, Any]) -> tuple[Number, Number]:
        """One step, queued before the numbers of the one before it are read, as in a run."""
        from loraloom.step import accumulate, queue_step

        before = self.last
        late = Late(
            queue_step(
                self.model,
                self.adapters,
                self.optimizer,
                [b["batch"]],
                step=self.number,
                num_steps=FOREVER,
                max_norm=self.config.train.max_grad_norm,
                inspect=self.look if self.number == 0 else None,
                backward=self.replay or accumulate,
                after=None if before is None or before.stats is not None else before.queued,
            )
        )
        if before is not None:
            before.settle()
        if not late.queued.moved:
            late.settle()
        self.number, self.last = self.number + 1, late
        return Number(late, "loss"), Number(late, "grad_norm")

    def look(self) -> None:
        self.without_grad = sum(p.grad is None for p in self.trained())

    def passes(self) -> dict[str, Any] | None:
        """How many passes were recorded and replayed."""
        if self.replay is None:
            return None
        return {
            "recorded": self.replay.recorded,
            "replayed": self.replay.replayed,
            "stopped": self.replay.stopped,
        }

    @property
    def multiplies8(self) -> bool:
        """Whether products with any weight are taken in fp8."""
        return any(getattr(p, "fp8", False) for p in self.model.parameters())

    def trained(self) -> list[Any]:
        return list(self.adapters.parameters())

    def about(self) -> dict[str, Any]:
        from loraloom.quant import bits_per_parameter, stored_bytes

        weights = sum(map(stored_bytes, self.model.parameters()))
        return {
            "recompute": self.recompute,
            "checkpoint": "off" if self.recompute == "none" else "on",
            "fp8": "on" if self.multiplies8 else "off",  # what is so, not what was asked for
            "fast": self.a.fast,
            "graphs": self.a.graphs,
            "passes": self.passes(),
            "dropout": self.a.dropout,
            "weights_gb": round(weights / 1e9, 3),
            "bits_a_weight": bits_per_parameter(self.model),
            "layers": self.notes,
            **({"compile_s": self.has("compiling", "compile_seconds")()} if self.a.compile == "on" else {}),
        }

    @staticmethod
    def release() -> None:
        import torch

        from loraloom.kernels.matmul_frozen import release_buffers

        release_buffers()
        if torch.cuda.is_available():
            torch._C._cuda_clearCublasWorkspaces()  # torch keeps them for the process, not for a model
        loop.clean()


def settings(a: argparse.Namespace, recompute: str) -> Any:
    """The run's settings, as from a file."""
    from loraloom.config import resolve

    chosen = {
        "model": a.model,
        "model.dtype": "bfloat16",
        "model.device": a.device,
        "model.quantize": a.quant,
        "model.fp8": BOOL[a.fp8],
        "model.attention": a.attention,
        "data": "none",
        "output": "none",
        "r": a.rank,
        "alpha": "2r",
        "dropout": a.dropout,
        "target_modules": kit.TARGETS[a.targets],
        "train.recompute": recompute,
        "train.fast": BOOL[a.fast],
        "train.graphs": BOOL[a.graphs],
        "train.compile": BOOL[a.compile],
        "train.weight_decay": 0.0,
    }
    return resolve(None, chosen)[0]


def own_path() -> None:
    """This project's sources and the benchmarks' helpers, first on the path; carried packages where they lack."""
    if importlib.util.find_spec("pydantic") is None:
        kit.use_site("loraloom")
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as in `loraloom train`


if __name__ == "__main__":
    own_path()
    loop.main(Loraloom, parser())
