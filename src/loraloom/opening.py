"""The first lines of a run, each told as soon as it is known: the model, the data, the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .adapt import Adapters
from .config import RunConfig, shown_alpha
from .model import Base

Tell = Callable[[str, str], None]  # given a line's name and its text


def unheard(name: str, text: str) -> None:
    """Tell nobody."""


def tell_model(tell: Tell, config: RunConfig, base: Base) -> None:
    tell("model", f"{config.model.id}  on {base.device}, {base.reason}")


def tell_method(tell: Tell, config: RunConfig, adapters: Adapters) -> None:
    """Once it sits on the model, on all the layers that it keeps."""
    trainable = sum(p.numel() for p in adapters.parameters())
    total = sum(p.numel() for p in adapters.model.parameters())
    layers = len(adapters.adapters["default"].sites)
    ranks = "" if config.r == "auto" else f"r {config.r}  alpha {shown_alpha(config)}  "
    share = f"{trainable:,} of {total:,} weights ({trainable / total:.2%})"
    tell("method", f"{config.method['name']}  {ranks}{layers} layers, {share}")


def tell_data(tell: Tell, report: Any) -> None:
    tell("data", report.summary)
