"""The eight GLUE tasks of the LoRA paper: where their rows are, and what is measured.

`glue:rte` stands for a configuration of the hub's nyu-mll/glue; its test labels are not public, so the validation
split is the held-out one, as in the paper; of MNLI's two it is the matched one, where the paper's figures are of both.

source  Wang et al. 2018, arXiv:1804.07461, table 1; LoRA paper, arXiv:2106.09685, table 2 for the metric reported
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Source
from ..errors import DataError, did_you_mean

PREFIX = "glue:"
SET = "hf:nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One task.

    metric    what the paper reports
    classes   how many labels; 0 for a number
    held_out  the split that is evaluated on
    """

    metric: str
    classes: int
    held_out: str = "validation"


TASKS = {
    "mnli": GlueTask("accuracy", 3, "validation_matched"),
    "sst2": GlueTask("accuracy", 2),
    "mrpc": GlueTask("accuracy", 2),
    "cola": GlueTask("matthews", 2),
    "qnli": GlueTask("accuracy", 2),
    "qqp": GlueTask("accuracy", 2),
    "rte": GlueTask("accuracy", 2),
    "stsb": GlueTask("pearson", 0),
}


def task_named(path: str) -> GlueTask | None:
    """The task of a source such as glue:rte; None for any other source.

    raises  DataError if there is no such task
    """
    if not path.startswith(PREFIX):
        return None
    name = path.removeprefix(PREFIX).replace("-", "").lower()
    if name not in TASKS:
        raise DataError(
            f"{path}: there is no such GLUE task here",
            details=[f"the tasks: {', '.join(TASKS)}"],
            hint=did_you_mean(name, TASKS),
        )
    return TASKS[name]


def on_hub(source: Source) -> Source:
    """The same source as the hub names it."""
    if task_named(source.path) is None:
        return source
    name = source.path.removeprefix(PREFIX).replace("-", "").lower()
    return source.model_copy(update={"path": f"{SET}:{name}"})
