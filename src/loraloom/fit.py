"""The largest pass that fits a GPU: `loraloom plan --fit`, and train.micro_tokens=fit.

units   bytes; a GPU sold as "80 GB" has 0.98 * 80 * 2**30 to give. Tokens of a pass in steps of GRAIN
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .config import RunConfig
from .errors import UserError
from .memory import CONTEXT, Predictor
from .workload import Workload

GRAIN = 64  # tokens between two sizes of a pass that are told apart
SOLD = 0.98  # of a GPU's gigabytes, what the driver leaves: an H100 "80GB" has 79.2 * 2**30 bytes
MOST = 1 << 18  # tokens of a pass beyond which nothing is gained


@dataclass(frozen=True)
class Gpu:
    """What there is to fit into."""

    name: str
    bytes: int  # that a process can take, its context included
    cudnn: bool = True  # Hopper and later: torch prefers cuDNN's attention


def largest_pass(predictor: Predictor, work: Workload, limit: int) -> int | None:
    """The most tokens of a pass whose step needs at most `limit` bytes; None if not even the smallest does."""
    most = min(MOST, work.step_tokens or MOST)
    found = largest(
        lambda grains: predictor.predict(work.batches(grains * GRAIN)).needed, limit, -(-most // GRAIN)
    )
    return None if found is None else found * GRAIN


def largest(cost: Callable[[int], int], limit: int, most: int) -> int | None:
    """The largest n from 1 to `most` with cost(n) <= limit, for a cost that rises with n.

    Each guess lies where the line through the two ends meets the limit, so that nearly straight costs take few.
    """
    low, below = 1, cost(1)
    if below > limit:
        return None
    high, above = most, cost(most)
    if above <= limit:
        return most
    halve = False
    while high - low > 1:
        share = 0.5 if halve else (limit - below) / (above - below)
        guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        now = cost(guess)
        halve = not halve and (guess - low > (high - low) // 2) == (now <= limit) and high - low > 8
        low, below, high, above = (guess, now, high, above) if now <= limit else (low, below, guess, now)
    return low


def nothing_fits(predictor: Predictor, work: Workload, gpu: Gpu) -> UserError:
    least, config = predictor.predict(work.batches(GRAIN)), predictor.config
    left = [] if config.train.gradient_checkpointing else ["--set train.gradient_checkpointing=true"]
    left += ["--set model.quantize=nf4"] if config.model.quantize == "none" else []
    return UserError(
        f"the smallest pass needs {least.needed / 1e9:.1f} GB, {gpu.name} has {gpu.bytes / 1e9:.1f}",
        details=[f"{part}: {size / 1e9:.2f} GB" for part, size in least.parts.items()],
        hint=", ".join(left) + ("or " if left else "") + "a smaller data.max_length, or a smaller model",
    )


def fit_pass(config: RunConfig, shape: Any, work: Workload, gpu: Gpu) -> int:
    """train.micro_tokens=fit: the most tokens of a pass that fits.

    raises  UserError if none does
    """
    predictor = Predictor(config, shape, cudnn=gpu.cudnn)
    found = largest_pass(predictor, work, gpu.bytes)
    if found is None:
        raise nothing_fits(predictor, work, gpu)
    return found


def find_gpu(text: str | None) -> Gpu | None:
    """The GPU that --gpu names by its size, such as 80GB; without it the first one here, or none.

    raises  UserError if it is no size
    """
    if text is None:
        if not torch.cuda.is_available():
            return None
        free, _ = torch.cuda.mem_get_info()
        # The context of this process stands in it by now, and is counted once more in what a run needs.
        name, hopper = torch.cuda.get_device_name(), torch.cuda.get_device_capability()[0] >= 9
        return Gpu(name, free + CONTEXT, hopper)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gi?b?)?\s*", text.lower())
    if not match or not float(match[1]):
        raise UserError(f"--gpu {text} is no size", hint="write gigabytes, such as 80GB")
    return Gpu(f"a GPU of {float(match[1]):g} GB", int(SOLD * float(match[1]) * 2**30))
