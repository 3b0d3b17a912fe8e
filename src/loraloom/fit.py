"""What fits a GPU: the least recomputation (train.recompute=auto), and the tokens of a pass (train.micro_tokens).

units   bytes; a GPU sold as "80 GB" has 0.98 * 80 * 2**30 to give. Tokens of a pass in steps of GRAIN
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .errors import UserError
from .memory import CONTEXT, Prediction, Predictor, tier
from .recompute import TIERS, Choice
from .workload import Workload
from .workshop import GPU_TOKENS, LONG_TOKENS, usual_tokens

GRAIN = 64  # tokens between two sizes of a pass that are told apart
SOLD = 0.98  # of a GPU's gigabytes, what the driver leaves: an H100 "80GB" has 79.2 * 2**30 bytes
MOST = 1 << 18  # tokens of a pass beyond which nothing is gained
EASILY = 0.9  # of a GPU's memory, what a pass that need not be so long may take


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
    left = [] if tier(config) == "offload" else ["--set train.recompute=offload"]
    left += ["--set model.quantize=nf4"] if config.model.quantize == "none" else []
    return UserError(
        f"the smallest pass needs {least.needed / 1e9:.1f} GB, {gpu.name} has {gpu.bytes / 1e9:.1f}",
        details=[f"{part}: {size / 1e9:.2f} GB" for part, size in least.parts.items()],
        hint=", ".join(left) + (", or " if left else "") + "a smaller data.max_length, or a smaller model",
    )


@dataclass(frozen=True)
class Tier:
    """What a recomputation needs, or why this model cannot."""

    name: str
    found: Prediction | None
    reason: str = ""


def tiers(predictor: Predictor, work: Workload, tokens: int) -> Iterator[Tier]:
    """Every recomputation with its prediction for passes of so many tokens, the one that keeps most first."""
    for name in TIERS:
        try:
            other = predictor.at(name)
        except UserError as error:
            yield Tier(name, None, error.message)
            continue
        yield Tier(name, other.predict(work.batches(tokens)))


def least_recompute(predictor: Predictor, work: Workload, tokens: int, gpu: Gpu) -> tuple[str, str]:
    """The recomputation that costs least time among those that fit, and why; the smallest if none fits."""
    tried: list[tuple[int, str]] = []
    room = f"{gpu.bytes / 1e9:.1f} GB there are"
    try:
        for one in tiers(predictor, work, tokens):
            if one.found is None:
                continue
            if one.found.needed <= gpu.bytes:
                before = f"; {tried[-1][1]} would need {tried[-1][0] / 1e9:.1f}" if tried else ""
                needs = f"a pass of {tokens:,} tokens needs {one.found.needed / 1e9:.1f}"
                return one.name, f"{needs} of the {room}{before}"
            tried.append((one.found.needed, one.name))
    except UserError as error:
        return "none", error.message
    needed, name = min(tried)
    return name, f"the smallest, and it needs {needed / 1e9:.1f} of the {room}"


def longer_pass(predictor: Predictor, work: Workload, gpu: Gpu) -> int | None:
    """The most that a pass of LONG_TOKENS needs; None if usual steps have no use for it, or memory would be tight.

    The host launches a pass in the same time however long it is, and products of more rows leave fewer processors
    idle (docs/speed.md, lengths like Alpaca's). Methods that start from batches see the same ones on every GPU.
    """
    usual, most = work.usual_step, 0
    if usual is None or usual <= GPU_TOKENS:
        return None
    if predictor.whole.adapter.method.needs not in (None, "originals"):
        return None
    try:
        kept = predictor.at("none")
        for batches in work.fullest(LONG_TOKENS):
            most = max(most, kept.predict(batches).needed)
            if most > EASILY * gpu.bytes:
                return None
    except UserError:
        return None  # least_recompute has said why
    return most


def choose(predictor: Predictor, work: Workload, gpu: Gpu, *, fit: bool = False) -> Choice:
    """What a run computes again and the tokens of its passes, as the settings say or as they fit.

    fit  the largest pass, whatever the settings say

    raises  UserError if a pass is to be fitted and not even the smallest fits
    """
    wish = predictor.config.train
    tokens = usual_tokens(predictor.config, "cuda")
    name: str = wish.recompute
    reason = "as set"
    if wish.recompute == "auto":
        name, reason = least_recompute(predictor, work, tokens, gpu)
        if name == "none" and wish.micro_tokens == "auto" and not fit:
            needs = longer_pass(predictor, work, gpu)
            if needs is not None:
                tokens = LONG_TOKENS
                reason = f"{reason}; one of {tokens:,} fits easily, with at most {needs / 1e9:.1f}"
    if fit or wish.micro_tokens == "fit":
        predictor = predictor.at(name)
        found = largest_pass(predictor, work, gpu.bytes)
        if found is None:
            raise nothing_fits(predictor, work, gpu)
        tokens = found
    return Choice(name, tokens, reason)


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
