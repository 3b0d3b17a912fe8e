"""Optimizers, their groups, schedules as pure functions of the step, and their state by name.

    lr(step) = base * warm-up(step) * decay(step)

A rate is computed from the step alone, so nothing of a schedule needs to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .errors import UserError
from .optim8 import AdamW8bit, PagedAdamW

Groups = list[dict[str, Any]]


def make_optimizer(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the settings over the groups; decay is put on matrices only.

    raises  UserError if state is to be paged and cannot be
    """
    ready = split_decay(groups, config.weight_decay)
    if config.paged:
        check_paged(ready, config.optimizer)
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(ready, momentum=config.momentum)
    elif config.optimizer == "adamw8bit":
        optimizer = AdamW8bit(ready, betas=config.betas, paged=config.paged)
    elif config.paged:
        optimizer = PagedAdamW(ready, betas=config.betas)
    else:
        optimizer = torch.optim.AdamW(ready, betas=config.betas, fused=on_gpu(ready) or None)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def on_gpu(groups: Groups) -> bool:
    """Whether all that trains is on GPUs: torch then has one kernel for the whole step, which keeps no temporaries."""
    return all(parameter.device.type == "cuda" for group in groups for parameter in group["params"])


def sgd_has_no_moments() -> UserError:
    return UserError(
        "train.paged keeps AdamW's moments in the host's memory, and train.optimizer is sgd",
        hint="set train.optimizer to adamw or adamw8bit, or leave train.paged out",
    )


def check_paged(groups: Groups, optimizer: str) -> None:
    if optimizer == "sgd":
        raise sgd_has_no_moments()
    if any(parameter.device.type != "cuda" for group in groups for parameter in group["params"]):
        raise UserError(
            "train.paged moves the optimizer's state between a GPU and the host, and this run has no GPU",
            hint="leave train.paged out: the state is in the host's memory already",
        )


def split_decay(groups: Groups, weight_decay: float) -> Groups:
    """Each group in two: matrices with decay, vectors (biases, magnitudes, norms) without."""
    ready: Groups = []
    for group in groups:
        decay = group.get("weight_decay", weight_decay)
        for matrices in (True, False):
            params = [p for p in group["params"] if (p.dim() >= 2) == matrices]
            if params:
                ready.append({**group, "params": params, "weight_decay": decay if matrices else 0.0})
    return ready


def warmup_steps(warmup: float, num_steps: int) -> int:
    """Steps of warm-up: a number, or below 1 a share of all steps."""
    return math.ceil(warmup * num_steps) if warmup < 1 else int(warmup)


def rate_factor(schedule: str, step: int, num_steps: int, num_warmup: int) -> float:
    """What the base rate is multiplied by at a step (from 0): rises to 1 over the warm-up, then decays.

    The last step of `linear` and `cosine` still moves a little: zero would be reached one step later.
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1.0 - done)
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    raise ValueError(f"there is no schedule {schedule!r}")


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group's base rate; returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def state_tensors(
    optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """The optimizer's state as `parameter|key` to tensor, copied, on the CPU."""
    if isinstance(optimizer, AdamW8bit):
        optimizer.finish()
    tensors: dict[str, Tensor] = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = value.detach().to("cpu", copy=True).contiguous()
    return tensors


def load_state(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `state_tensors` gave.

    raises  KeyError if a tensor belongs to no parameter
    """
    parameters = dict(named)
    for full, value in tensors.items():
        name, _, key = full.rpartition("|")
        parameter = parameters[name]
        if isinstance(optimizer, AdamW8bit):
            optimizer.put(parameter, key, value)
            continue
        # AdamW counts its steps in a tensor on the CPU unless it is fused.
        fused = any(group.get("fused") for group in optimizer.param_groups)
        device = value.device if value.dim() == 0 and not fused else parameter.device
        optimizer.state[parameter][key] = value.to(device).clone()
