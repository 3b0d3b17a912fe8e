"""The whole state of a run on the disk, and back: training goes on as if it had not stopped.

checkpoints/step-000100/   a PEFT folder that loads by itself, and beside it
    state.safetensors      every tensor of the method and of the optimizer, and the generators' states
    progress.json          the step, the best loss so far, how long it has not improved
adapter/                   the best adapter so far, with the tokenizer: what every later verb uses
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialise

from . import files
from .adapter_io import save_adapter
from .errors import UserError
from .optim import load_state, state_tensors
from .rundir import Run
from .workshop import Workshop

STATE = "state.safetensors"
PROGRESS = "progress.json"


@dataclass
class Progress:
    """Where a run stands; everything else that moves is in tensors."""

    step: int = 0  # optimizer steps taken
    base_loss: float | None = None  # held-out nats per target before the first step
    best_loss: float | None = None
    best_step: int | None = None
    waited: int = 0  # evaluations since the best one
    metric: str | None = None  # what the best adapter is best in, if it is not the loss
    best_score: float | None = None  # of that metric; more is better

    def note(self, loss: float, *, base: float | None = None, score: tuple[str, float] | None = None) -> bool:
        """Take in a held-out loss; returns whether it is the best so far.

        base   that of the base, where the method does not start from it
        score  a metric and its value, which decides then; the loss decides between equal ones
        """
        if self.step == 0:
            self.base_loss = loss if base is None else base
        if self.best_loss is None or self.is_better(loss, score):
            self.best_loss, self.best_step, self.waited = loss, self.step, 0
            if score is not None:
                self.metric, self.best_score = score
            return True
        self.waited += 1
        return False

    def is_better(self, loss: float, score: tuple[str, float] | None) -> bool:
        assert self.best_loss is not None
        if score is None or self.best_score is None:
            return loss < self.best_loss
        return (score[1], -loss) > (self.best_score, -self.best_loss)

    def waited_enough(self, patience: int | None) -> bool:
        return patience is not None and self.waited >= patience


def save_checkpoint(shop: Workshop, run: Run, progress: Progress) -> Path:
    """Write the whole state under its step, then drop the checkpoints over `train.keep`."""
    path = run.path / "checkpoints" / f"step-{progress.step:06d}"
    if not shop.evaluates:
        # Nothing says which adapter is best: the last one is. It comes first, so that it is never the older one.
        save_best(shop, run, progress)
    with files.whole_folder(path) as folder:
        write_adapter(shop, folder)
        files.write_bytes(folder / STATE, serialise(state_of(shop), {"format": "pt"}))
        files.write_json(folder / PROGRESS, asdict(progress))
    for _, old in run.checkpoints()[: -shop.config.train.keep]:
        files.remove_folder(old)
    return path


def clear(run: Run) -> None:
    """Remove what a process left that was killed while it wrote or removed; only the run's one writer may."""
    run.checkpoints()  # completes the exchanges that can be
    for left in list(run.path.rglob(files.PARTIAL + "*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def discard_diverged(shop: Workshop, run: Run, progress: Progress) -> None:
    """Set aside a checkpoint of weights that turned out to have diverged; the one before it is the last good one.

    Where no held-out loss chose the adapter, the run's adapter goes back to that one too, or goes.
    """
    for step, path in run.checkpoints():
        if step == progress.step:
            aside = run.path / "diverged"
            if aside.is_dir():
                files.remove_folder(aside)
            os.rename(path, aside)
    if not shop.evaluates and (run.path / "diverged").is_dir():
        if run.adapter_path.is_dir():
            files.remove_folder(run.adapter_path)
        latest = run.latest()
        if latest is not None:
            save_best(shop, run, restore(shop, latest[1]))


def save_best(shop: Workshop, run: Run, progress: Progress) -> None:
    """Make the adapter as it is now the run's adapter."""
    with files.whole_folder(run.adapter_path) as folder:
        write_adapter(shop, folder)
        shop.tokenizer.save_pretrained(folder)
        generation = getattr(shop.model, "generation_config", None)
        if generation is not None:
            files.write_text(folder / "generation_config.json", generation.to_json_string())
        files.write_json(folder / "summary.json", summary(shop))
    if progress.best_loss is not None:
        best: dict[str, Any] = {"step": progress.best_step, "loss": progress.best_loss}
        if progress.metric is not None:
            best |= {"metric": progress.metric, progress.metric: progress.best_score}
        run.update(best=best, base_loss=progress.base_loss)


def write_adapter(shop: Workshop, folder: Path) -> None:
    source = shop.loaded.source
    about: dict[str, Any] = {"revision": source.commit} if source.commit else {}
    model = shop.config.model
    kept = model.model_dump(include={"quantize", "double_quant", "quant_block"})
    kept["dtype"] = str(shop.loaded.dtype).removeprefix("torch.")  # the codes are those of numbers in it
    save_adapter(
        shop.adapters,
        folder,
        base_model=model.id,
        trained_on=kept if model.quantize != "none" else None,
        **about,
    )
    for name, content in shop.prepared.report.beside.items():
        files.write_json(folder / name, content)


def summary(shop: Workshop) -> dict[str, Any]:
    """Sizes of each layer's update, for the report."""
    layers = []
    with torch.no_grad():
        for key, site in next(iter(shop.adapters.adapters.values())).sites.items():
            norms = {f"norm_{name}": float(tensor.norm()) for name, tensor in site.p.items() if name in "AB"}
            pair = getattr(site.method, "pair", None)
            if pair is not None:
                norms["norm_delta"] = product_norm(pair(site.layer, site.p))
            layers.append(
                {"name": key, "r": site.method.r, "alpha": site.method.alpha, **norms}
                | ({"norm_W": shop.base_norms[key]} if key in shop.base_norms else {})
            )
    return {"layers": layers}


def product_norm(pair: Any) -> float:
    """|| B e A ||_F without the product: tr((B^T B)(A A^T)), R x R."""
    b_OR = pair.B * pair.e if pair.out is None else pair.out[:, None] * pair.B * pair.e
    return float(((b_OR.T @ b_OR) * (pair.A @ pair.A.T)).sum().clamp(min=0).sqrt())


def state_of(shop: Workshop) -> dict[str, torch.Tensor]:
    """Every tensor that training moves, on the CPU, by name."""
    tensors = {
        key: tensor.detach().to("cpu", copy=True).contiguous()
        for key, tensor in shop.adapters.named_tensors().items()
    }
    moments = state_tensors(shop.optimizer, shop.adapters.named_parameters())
    tensors |= {f"optimizer|{key}": tensor for key, tensor in moments.items()}
    tensors["random|cpu"] = torch.get_rng_state()
    if shop.loaded.device.type == "cuda":
        tensors["random|cuda"] = torch.cuda.get_rng_state(shop.loaded.device)
    return tensors


def restore(shop: Workshop, folder: Path) -> Progress:
    """Put a checkpoint's state into a freshly built workshop.

    raises  UserError if the checkpoint does not hold just what the workshop needs
    """
    try:
        tensors = parse((folder / STATE).read_bytes())
        progress = Progress(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder} is no whole checkpoint: {error}", hint="remove it, to go on from the one before it"
        ) from None
    kept = {key: value for key, value in tensors.items() if not key.startswith(("optimizer|", "random|"))}
    wanted = shop.adapters.named_tensors()
    wrong = list(kept.keys() ^ wanted.keys())
    wrong += [key for key in kept.keys() & wanted.keys() if kept[key].shape != wanted[key].shape]
    if wrong:
        raise UserError(f"{folder} is of a run with other settings", details=sorted(wrong)[:10])
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(tensors[key])
    moments = {
        key.removeprefix("optimizer|"): t for key, t in tensors.items() if key.startswith("optimizer|")
    }
    load_state(shop.optimizer, shop.adapters.named_parameters(), moments)
    torch.set_rng_state(tensors["random|cpu"])
    if "random|cuda" in tensors and shop.loaded.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random|cuda"], shop.loaded.device)
    return progress
