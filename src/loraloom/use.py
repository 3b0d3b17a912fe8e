"""A run, an adapter or a plain model, opened for use: evaluate, chat.

A run folder brings everything with it: the base, the adapter, how prompts are written, the held-out examples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import hub
from .adapt import Adapters
from .adapter_files import about_base, is_adapter_folder, read_record, trained_on
from .adapter_io import load_adapter
from .classifier import load_classifier, longest_input
from .config import DataConfig, ModelConfig, Source
from .conversation import Conversation
from .data import Examples, LabelledExamples, Labels, Style, prepare, render_prompt, resolve_style
from .data import cache as store
from .data.labelled import read_file as read_labelled
from .data.report import LOST
from .errors import DataError, UserError, nearest
from .evaluate import evaluate_run
from .evaluate_labels import evaluate_labels
from .files import write_json
from .generate import context_length
from .model import Loaded, load_model
from .model_files import read_json, stored_format
from .rundir import STATE, Run, find_runs
from .text_metrics import check_metrics
from .workshop import UNLIMITED

HELD_OUT = "held-out"  # the table of the run's own rows
STORED = "stored"  # the number format that the base's weights have on the disk


@dataclass
class Opened:
    """A model ready for use, with its adapter if there is one."""

    target: str
    loaded: Loaded
    adapters: Adapters | None
    style: Style
    run: Run | None = None
    offline: bool = False

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    def examples(self, data: str | None = None) -> Examples:
        """The run's held-out examples, or those of a file, written as the run writes them.

        raises  DataError if there are none
        """
        return held_out(self.target, self.run) if data is None else self.examples_of(data)

    def examples_of(self, data: str) -> Examples:
        given = self.run.config.data if self.run is not None else DataConfig(train=[Source(path=data)])
        config = given.model_copy(
            update={
                "train": [Source(path=data)],
                "eval": 0.0,
                "prompt": self.style.name,
                "system": self.style.system,
            }
            | {"limit": None, "max_length": "auto", "max_lost": 0.999, "duplicates": "keep"}
        )
        limit = context_length(self.model) or UNLIMITED
        how: dict[str, Any] = {"model_max_length": limit, "offline": self.offline, "progress": False}
        return prepare(config, self.tokenizer, **how).train


def held_out(target: str, run: Run | None) -> Examples:
    """A run's held-out examples.

    raises  DataError if there are none
    """
    found = store.fetch(run.path / "data" / "held-out") if run is not None else None
    if found is None or not len(found[1]):
        raise DataError(f"{target} has no held-out examples", hint="name a file of them: --data FILE")
    return found[1]


@dataclass(frozen=True)
class Found:
    """What a target stands for, before anything is loaded.

    base     the model, as the run had it; adapter is a PEFT folder, None for a plain model
    dtype    the base's number format in training, if that is known
    keep     ends of names of modules that the adapter trained whole, which were not in 4 bits
    """

    target: str
    base: ModelConfig
    adapter: Path | None
    run: Run | None = None
    dtype: str | None = None
    keep: tuple[str, ...] = ()

    @property
    def classes(self) -> dict[str, Any] | None:
        """What a classifier's adapter says of its labels; None for an adapter on text, or a plain model."""
        path = self.adapter / "labels.json" if self.adapter is not None else None
        return read_json(path) if path is not None and path.is_file() else None

    @property
    def labels(self) -> Labels | None:
        return Labels(tuple(self.classes["labels"])) if self.classes is not None else None


def find_target(target: Path | str, *, model: str | None = None) -> Found:
    """Find a run folder, an adapter folder, or a model (a folder or an id).

    model  the base, instead of the one that the run or the adapter names

    raises  UserError if it is a run without an adapter, or the adapter's base cannot be known
    """
    path = Path(target)
    if (path / STATE).is_file():
        run = Run.open(path)
        adapter = run.adapter_path
        if not is_adapter_folder(adapter):
            raise UserError(
                f"{path} has no adapter yet ({run.state.get('status')})", hint=f"loraloom resume {path}"
            )
        config = run.config.model.model_copy(update={"id": model, "revision": None} if model else {})
        return Found(str(path), config, adapter, run, run.env.get("dtype"), tuple(run.config.modules_to_save))
    if is_adapter_folder(path):
        about = about_base(path)
        base = model or about.get("base_model_name_or_path")
        if not base:
            raise UserError(f"{path} does not name its base model", hint="name it: --model ID_OR_FOLDER")
        kept = trained_on(path)
        keep = tuple(about.get("modules_to_save") or ())
        return Found(str(target), ModelConfig(id=base, **kept), path, None, kept.get("dtype"), keep)
    if not path.exists() and str(path.parent) != "." and path.parent.is_dir():
        Run.open(path)  # raises, and says which runs are near
    return Found(str(target), ModelConfig(id=str(target)), None)


def open_target(
    target: Path | str, *, model: str | None = None, dtype: str | None = None, offline: bool = False
) -> Opened:
    """Open a run folder, an adapter folder, or a model (a folder or an id).

    model  the base, instead of the one that the run or the adapter names
    dtype  the base's number format, instead of the run's; "stored" for the one it has on the disk

    raises  UserError if it is none of them, or its base cannot be found
    """
    found = find_target(target, model=model)
    if found.labels is not None:
        raise UserError(
            f"{target} is a classifier: it answers with a label, not with text",
            hint=f"measure it: loraloom eval {target}",
        )
    loaded, adapters = load_found(found, dtype or found.dtype, offline=offline)
    style = style_of(found.adapter or Path(target), loaded)
    return Opened(str(target), loaded, adapters, style, found.run, offline)


def load_found(found: Found, dtype: str | None, *, offline: bool) -> tuple[Loaded, Adapters | None]:
    """The base, and the adapter on it."""
    with near_runs(found):
        loaded = load_base(found, dtype, offline=offline)
    return loaded, load_adapter(loaded.model, found.adapter) if found.adapter is not None else None


@contextmanager
def near_runs(found: Found) -> Iterator[None]:
    """What is no model may be a run whose name was mistyped."""
    path = Path(found.target)
    try:
        yield
    except UserError as error:
        near = nearest(found.target, [str(run.path) for run in find_runs(path.parent, depth=1)], count=1)
        if found.adapter is None and near and not path.exists():
            error.hint = f"did you mean {near[0]}, a run?"
        raise


def load_base(found: Found, dtype: str | None, *, offline: bool) -> Loaded:
    """The base in a number format: one that is named, the one on its disk, or what the settings say."""
    config = found.base
    if dtype == STORED:
        source = hub.resolve(
            config.id, revision=config.revision, offline=offline, allow_pickle=config.allow_pickle
        )
        dtype = stored_format(source.path)
    config = config.model_copy(update={"dtype": dtype} if dtype else {})
    if found.labels is not None:
        record = read_record(found.adapter) if found.adapter is not None else None
        seed = int(record.spec.get("seed", 0)) if record is not None else 0  # the head's, as in training
        return load_classifier(config, found.labels, seed=seed, offline=offline)
    return load_model(config, keep=found.keep, offline=offline)


def style_of(folder: Path, loaded: Loaded) -> Style:
    """How prompts are written: as the adapter was trained, else the tokenizer's chat template, else plain."""
    path = folder / "style.json"
    if path.is_file():
        return Style.from_dict(json.loads(path.read_text(encoding="utf-8")))
    return resolve_style("chat" if loaded.tokenizer.chat_template else "plain", None, loaded.tokenizer, [])


def evaluate(
    target: Path | str,
    *,
    data: str | None = None,
    num_answers: int = 200,
    max_new_tokens: int | None = None,
    model: str | None = None,
    dtype: str | None = None,
    metrics: Sequence[str] = (),
    offline: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Held-out loss, perplexity and exact match of the base beside the tuned model, with standard errors.

    The result is also kept in the run's eval/ folder, and shown in its report.

    metrics  more of the answers, from text_metrics.METRICS
    """
    check_metrics(metrics)  # before a large model is loaded
    found = find_target(target, model=model)
    name = table_name(data)
    if found.labels is not None:
        if max_new_tokens is not None:
            raise UserError(f"{target} is a classifier: --max-new-tokens is for answers in text")
        if metrics:
            raise UserError(f"{target} is a classifier: --metrics is for answers in text")
        return measure_labels(found, name, data=data, dtype=dtype, offline=offline)
    opened = open_target(target, model=model, dtype=dtype, offline=offline)
    if opened.adapters is None:
        raise UserError(
            f"{target} has no adapter to compare with its base", hint="name a run or an adapter folder"
        )
    examples = opened.examples(data)
    result = evaluate_run(
        opened.model,
        opened.tokenizer,
        opened.adapters,
        examples,
        pad_id=opened.loaded.pad_id,
        stop_ids=opened.loaded.stop_ids,
        style=opened.style.name,
        num_answers=num_answers,
        max_new_tokens=max_new_tokens,
        packing=opened.run.config.data.packing if opened.run else True,
        name=name,
        metrics=metrics,
        progress=progress,
    )
    if opened.run is not None:
        write_json(opened.run.path / "eval" / f"{result['name']}.json", result)
    return result


def table_name(data: str | None) -> str:
    """What the table of a file of examples is kept as.

    raises  UserError for a file that would be kept as the run's own held-out rows
    """
    if data is None:
        return HELD_OUT
    if Path(data).stem == HELD_OUT:
        raise UserError(
            f"{data} would be kept as {HELD_OUT}, which stands for the run's own rows",
            hint="leave --data out to measure those, or give the file another name",
        )
    return Path(data).stem


def measure_labels(
    found: Found, name: str, *, data: str | None, dtype: str | None, offline: bool
) -> dict[str, Any]:
    """`evaluate` for a classifier: on the run's held-out rows, or those of a file.

    raises  DataError if there are none
    """
    about, labels, run = found.classes, found.labels, found.run
    assert about is not None
    assert labels is not None
    loaded, adapters = load_found(found, dtype or found.dtype, offline=offline)
    assert adapters is not None
    left_out = 0
    if data is not None:
        given = run.config.data if run is not None else DataConfig(train=[Source(path=data)])
        limit = longest_input(loaded.model, loaded.tokenizer)
        how: dict[str, Any] = {"model_max_length": limit, "offline": offline}
        examples, issues = read_labelled(data, given, labels, loaded.tokenizer, **how)
        left_out = len({issue.row for issue in issues if issue.kind in LOST})
    else:
        examples = held_labelled(found)
    best = run.config.eval.best if run is not None else "auto"
    result = evaluate_labels(
        loaded.model,
        loaded.tokenizer,
        adapters,
        examples,
        labels,
        about["train"],
        pad_id=loaded.pad_id,
        main=best,
        name=name,
        left_out=left_out,
    )
    if run is not None:
        write_json(run.path / "eval" / f"{result['name']}.json", result)
    return result


def held_labelled(found: Found) -> LabelledExamples:
    """A classifier run's held-out rows.

    raises  DataError if there are none
    """
    run = found.run
    held = store.fetch_labelled(run.path / "data" / "held-out") if run is not None else None
    if held is None or not len(held):
        raise DataError(f"{found.target} has no held-out rows", hint="name a file of them: --data FILE")
    return held


def converse(opened: Opened, **settings: Any) -> Conversation:
    """A conversation with the tuned model; it can switch to the base and back."""
    return Conversation(
        opened.model,
        opened.tokenizer,
        opened.adapters,
        opened.style,
        render=render_prompt,
        stop_ids=opened.loaded.stop_ids,
        pad_id=opened.loaded.pad_id,
        **settings,
    )
