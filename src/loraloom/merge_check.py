"""Does a merged model answer as its adapter did? One model is in memory at a time; logits are kept in between.

The rule: a merge is judged against the adapter on the base that it was merged into, in the result's own number
format. Only rounding differs there, which the limits of verify.py are made for. `--base original` puts an
adapter that was trained in 4 bits on another base than the one it knows. How far the result is from the tuned 4-bit
model is measured and said, but fails nothing: it is what was asked for, and no rounding.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import verify
from .adapt import Adapters
from .config import ModelConfig
from .doctor import main_memory
from .merge_table import Merged
from .model import Loaded, Task, load_model
from .model_files import find_weights
from .verify import Verification

LOGITS = 2 << 30  # bytes that kept logits may take: a long prompt of a large vocabulary has a gigabyte
ROOM = 1.1  # of a model's weights: with what it computes on one prompt
Tuned = Callable[[], tuple[Loaded, Adapters]]


@dataclass(frozen=True)
class MergeResult:
    """What was written, and how far it is from the adapter.

    verification  against the adapter on the same base; None if it was skipped, `skipped` says why
    trained       against the tuned 4-bit model, where that is another; not judged
    """

    merged: Merged
    verification: Verification | None
    trained: Verification | None
    skipped: str | None

    @property
    def ok(self) -> bool:
        return self.verification is None or self.verification.ok

    def to_dict(self) -> dict[str, Any]:
        """What merge.json keeps."""
        found = self.merged.to_dict() | {"ok": self.ok, "verified": self.verification is not None}
        found |= self.verification.to_dict() if self.verification else {"skipped": self.skipped}
        if self.trained is not None:
            keys = ("mean_kl", "max_kl", "top1_agreement", "max_logit_difference")
            found["against_4bit"] = {key: getattr(self.trained, key) for key in keys}
        return found


class Recorded:
    """Logits of the base and the tuned model on the prompts."""

    def __init__(self, loaded: Loaded, adapters: Adapters, prompts: Sequence[list[int]]) -> None:
        self.logits: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self.attention: str = loaded.model.config._attn_implementation
        adapters.eval()
        for prompt in prompts:
            ids = torch.tensor([prompt], device=loaded.device)
            tuned = verify.logits_of(loaded.model, ids).cpu()[None]
            with adapters.disabled():
                base = verify.logits_of(loaded.model, ids).cpu()[None]
            self.logits[tuple(prompt)] = [tuned, base]

    def tuned(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits[tuple(ids[0].tolist())][0]

    def base(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits[tuple(ids[0].tolist())][1]


def verify_merge(
    folder: Path,
    tuned: Tuned,
    trained: Tuned | None,
    prompts: Sequence[list[int]],
    *,
    dtype: str,
    device: torch.device,
    task: Task = "causal",
    on_prompt: Callable[[int], None] | None = None,
) -> tuple[Verification, Verification | None]:
    """Compare the model in a folder with its adapter.

    tuned    loads the adapter on the base that it was merged into
    trained  loads it on the base in 4 bits, if that is another
    task     classify for a model with one answer a prompt
    """
    before = record(tuned, prompts)
    known = record(trained, prompts) if trained is not None else None
    same = {"attention": before.attention} if task == "classify" else {}  # not every encoder has sdpa's
    config = ModelConfig(id=str(folder), dtype=dtype, device=str(device), **same)
    merged = load_model(config, offline=True, task=task)
    result = verify.compare_models(
        before.tuned, merged.model, prompts, dtype=dtype, base=before.base, on_prompt=on_prompt
    )
    if known is None:
        return result, None
    return result, verify.compare_models(known.tuned, merged.model, prompts, dtype=dtype, base=known.base)


def record(load: Tuned, prompts: Sequence[list[int]]) -> Recorded:
    """The logits of a model that is in memory only here."""
    loaded, adapters = load()
    recorded = Recorded(loaded, adapters, prompts)
    del loaded, adapters
    released()
    return recorded


def released() -> None:
    """Give back what a model took that nobody holds any more; a model and its adapters hold each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def within(prompts: Sequence[list[int]], vocabulary: int, models: int) -> list[list[int]]:
    """As many prompts as the kept logits of so many models have room for, the last one cut."""
    left = max(8, LOGITS // (vocabulary * 4 * 2 * models))
    found = []
    for prompt in prompts:
        if prompt[:left]:
            found.append(list(prompt[:left]))
            left -= len(found[-1])
    return found


def too_large(folder: Path, device: torch.device) -> str | None:
    """Why the model in a folder cannot be verified here, in words; None if it can."""
    needed = int(ROOM * find_weights(folder).bytes)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        memory = main_memory()
        free = memory[1] if memory is not None else needed
    if needed <= free:
        return None
    return f"the model needs {needed / 1e9:.1f} GB on {device}, and {free / 1e9:.1f} GB are free"
