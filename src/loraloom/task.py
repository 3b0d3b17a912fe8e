"""What the loop asks of a task: everything in which text and labels differ while training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .checkpoint import Progress
from .rundir import Run
from .workshop import Workshop

Listen = Callable[[str, Any], None]


@dataclass(frozen=True)
class Task:
    """One task.

    packer    gives what makes the micro-batches of a step
    gradient  the gradient of a step's loss (step.Backward), or None for the step's own
    broken    the rows whose loss is not finite (step.Broken), or None for the step's own
    evaluate  measures the model as it is, logs it, and keeps the best adapter
    """

    packer: Callable[[Workshop], Callable[[int], Sequence[Any]]]
    gradient: Callable[..., Any] | None
    broken: Callable[..., list[str]] | None
    evaluate: Callable[[Workshop, Run, Progress, Listen], None]
