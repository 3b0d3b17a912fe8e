"""One run of a study, in a process of its own: trained or gone on with, then scored on the final rows.

A process for each run keeps its peak memory apart from the others', and what ends one does not end the rest.

    python -m loraloom.study_run TASK          a JSON object; TASK["failure"] is written if the run cannot be made
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from . import api, console
from .errors import INTERRUPTED, UserError
from .files import write_json
from .rundir import STATE, Run

FINISHED = ("done", "stopped_early")
SCORES = "eval/final.json"
TASKS = "eval/tasks.json"


class Bar(console.TrainView):
    """Only the bar of the steps: a study has many runs, and each begins with the same facts."""

    def on_fact(self, fact: tuple[str, str]) -> None:
        """Nothing."""

    def on_workshop(self, shop: Any) -> None:
        if not self.plain:
            super().on_workshop(shop)

    def on_step(self, record: dict[str, Any]) -> None:
        if self.bar is not None:
            super().on_step(record)

    def on_eval(self, record: dict[str, Any]) -> None:
        """The study's table has the losses."""

    def on_sample(self, record: dict[str, Any]) -> None:
        """The run's own report has the answers."""


def make(task: dict[str, Any], listen: api.Listener = api.silent) -> Run:
    """Bring a run to its end: train it, or go on with it; then score it, once.

    raises  what api.train and use.evaluate do
    """
    path = Path(task["run"])
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if not (path / STATE).is_file():
        api.train(settings=task["settings"], listen=listen, offline=task["offline"], argv=task["argv"])
    elif Run.open(path).state.get("status") not in FINISHED:
        api.resume(path, listen=listen, offline=task["offline"])
    run = Run.open(path)
    if not (path / SCORES).is_file():
        api.evaluate(
            path, data=task["final"], num_answers=task["answers"], offline=task["offline"], progress=False
        )
        api.write_pages(run)
    if task["tasks"] and not (path / TASKS).is_file():
        from .benchmark import benchmark  # its library is only there where it was asked for

        given = {"limit": task["task_limit"], "data_dir": task["task_data"], "offline": task["offline"]}
        benchmark([str(path)], task["tasks"], name=Path(TASKS).stem, **given)
        api.write_pages(run)
    return run


def main(text: str) -> int:
    """The exit code is that of `loraloom train`."""
    task = json.loads(text)
    try:
        make(task, Bar(quiet=task["quiet"]))
    except UserError as error:
        write_json(task["failure"], {"message": error.message, "details": error.details, "hint": error.hint})
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
