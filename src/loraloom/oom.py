"""Out of memory in words: what grew, and which two changes save how much, as the predictor sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .config import RunConfig, with_values
from .errors import OutOfMemory, UserError
from .memory import Predictor, tier
from .workload import Workload

LEAST_TOKENS = 256  # below this a pass is not halved
SHOWN = 2  # changes named
NEXT = {"none": "full", "gate_up": "full", "full": "offload"}  # what saves more


@dataclass(frozen=True)
class Change:
    """A change of settings and what it saves."""

    settings: dict[str, Any]
    saved: int  # bytes of the highest point

    @property
    def words(self) -> str:
        return " ".join(f"{name}={str(value).lower()}" for name, value in self.settings.items())


def candidates(config: RunConfig, micro_tokens: int) -> Iterator[dict[str, Any]]:
    """The changes that may help, each by itself."""
    if micro_tokens // 2 >= LEAST_TOKENS:
        yield {"train.micro_tokens": micro_tokens // 2}
    if tier(config) in NEXT:
        yield {"train.recompute": NEXT[tier(config)]}
    if config.model.quantize == "none":
        yield {"model.quantize": "nf4"}
    if config.train.optimizer == "adamw":
        yield {"train.optimizer": "adamw8bit"}
    if config.r != "auto" and config.r > 8:
        yield {"r": config.r // 2}


def savings(
    config: RunConfig, shape: Any, work: Workload, micro_tokens: int, *, cudnn: bool = True
) -> list[Change]:
    """Every change that saves memory, the largest saving first; one that does not fit the model is left out."""
    now = Predictor(config, shape, cudnn=cudnn).predict(work.batches(micro_tokens)).allocated
    changes = []
    for settings in candidates(config, micro_tokens):
        tokens = settings.get("train.micro_tokens", micro_tokens)
        try:
            other = Predictor(with_values(config, settings), shape, cudnn=cudnn)
            saved = now - other.predict(work.batches(tokens)).allocated
        except UserError:
            continue
        if saved > 0:
            changes.append(Change(settings, saved))
    return sorted(changes, key=lambda change: -change.saved)


def explain_oom(
    config: RunConfig,
    shape: Any,
    work: Workload,
    micro_tokens: int,
    *,
    cudnn: bool = True,
    total: int | None = None,
    said: str | None = None,
) -> OutOfMemory:
    """The error to show when a step ran out of memory.

    shape  the model's transformers config
    total  bytes of the GPU, if they are known
    said   torch's own message

    raises  UserError if the model's memory cannot be predicted
    """
    found = Predictor(config, shape, cudnn=cudnn).predict(work.batches(micro_tokens))
    parts = sorted(found.parts.items(), key=lambda item: -item[1])
    grown = max(("activations", "workspace"), key=found.parts.__getitem__)
    changes = savings(config, shape, work, micro_tokens, cudnn=cudnn)[:SHOWN]
    details = [said.splitlines()[0]] if said else []
    details += [f"{part:<12} {size / 1e9:7.2f} GB" for part, size in parts if size]
    details += [f"--set {change.words} saves {change.saved / 1e9:.2f} GB" for change in changes]
    room = f" of the GPU's {total / 1e9:.1f}" if total else ""
    return OutOfMemory(
        f"out of memory at {micro_tokens:,} tokens in a pass, in {found.phase}: the step takes "
        f"{found.allocated / 1e9:.1f} GB{room}; what grew with the batch is {grown}, {found.parts[grown] / 1e9:.1f} GB",
        details=details,
        hint=" ".join(f"--set {change.words}" for change in changes) or "use a smaller model",
    )
