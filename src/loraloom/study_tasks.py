"""A study's benchmarks, loaded before its first run: a run is scored when it is finished, too late for a wrong name.

raises  UserError for a task that cannot be had, missing or malformed files, or without lm-evaluation-harness
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from .errors import UserError
from .study_file import Study


def check_tasks(study: Study, *, offline: bool) -> dict[str, str]:
    """Load every task as the runs will; SHA-256 of the documents of those that task_data serves, by task."""
    if not study.file.tasks:
        return {}
    if find_spec("lm_eval") is None:
        raise UserError(
            f"{study.name} asks for {', '.join(study.file.tasks)}", hint="pip install 'loraloom[eval]'"
        )
    from .benchmark import choose
    from .harness import Options  # lm-eval is only there where it was asked for

    names, files, asked = study.tasks, study.task_data, Options(limit=study.file.task_limit)
    with TemporaryDirectory(prefix="loraloom-study-") as folder:
        try:
            chosen = choose(names, files, Path(folder), asked, None, offline, False)
        except UserError as error:
            own = [text.replace("--data-dir", "task_data") for text in (error.message, error.hint or "")]
            error.message, error.hint = f"{study.path.name}, tasks: {own[0]}", own[1] or None
            raise
    return {name: task.digest for name, task in chosen.local.items()}
