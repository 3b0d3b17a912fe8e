"""What every setting of a study would take, before anything trains: weights that train, memory, steps.

Counts are of the adapter as it would be attached, on shapes, without a classifier's head. They must be those that the
study expects. Memory is the
predicted peak of a step on a GPU, in passes of train.micro_tokens (8,192 if that is auto).

units   bytes
raises  UserError where a count is not the expected one: every setting that is wrong
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import classifying
from .adapt import Adapters
from .classifier import head_size, meta_classifier
from .config import RunConfig, with_values
from .data import Labels
from .errors import UserError
from .memory import Predictor, dtype_of
from .optim8 import state_bytes
from .packing import DEFAULT_BATCH
from .plan import NO_DATA, folder_of, open_choice
from .skeleton import make_shape, meta_model, read_shape, text_config
from .study_data import split_data
from .study_file import Setting, Study
from .trace import Shapes
from .workload import assumed
from .workshop import UNLIMITED, any_ids, method_defaults, spec_of


@dataclass(frozen=True)
class Planned:
    """A setting's prediction. steps and memory are None where they cannot be foreseen."""

    name: str
    trainable: int
    total: int
    state: int  # of the optimizer
    memory: int | None
    steps: int | None
    why: str = ""  # memory is None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_study(study: Study, *, memory: bool = True, offline: bool = False) -> list[Planned]:
    """Every setting in the study's order, and its count compared with what is expected.

    memory  predict it too; a count alone takes a second for GPT-3

    raises  UserError as above, or for settings that do not fit the model
    """
    models: dict[str, Any] = {}
    plans = []
    rows = rows_of(study, offline=offline) if memory else None
    for setting in study.settings:
        config = study.config(setting)
        model = shapes_of(study, config, models, offline=offline)
        plans.append(predict(setting, config, model, rows, memory=memory))
    check_expected(study, {one.name: one.trainable for one in plans})
    return plans


def shapes_of(study: Study, config: RunConfig, known: dict[str, Any], *, offline: bool) -> Any:
    """The model without weights: of the shipped config.json, else of the model itself; made once.

    A classifier's has two classes, of which the counts do not depend.
    """
    key = config.model.id
    if key not in known:
        shipped = study.shape(key)
        about = make_shape(**shipped) if shipped else read_shape(folder_of(config, offline=offline))
        if config.task == "classification":
            known[key] = meta_classifier(about, Labels(("0", "1")), dtype_of(config))
        else:
            known[key] = meta_model(about, dtype=dtype_of(config))
    return known[key]


def predict(setting: Setting, config: RunConfig, model: Any, rows: int | None, *, memory: bool) -> Planned:
    """One setting on shapes."""
    adapters = Adapters(model)
    head = 0
    try:
        config = with_values(config, method_defaults(config))
        if config.task == "classification":
            config, head = classifying.planned(config, model), head_size(model)
        with torch.device("meta"), Shapes():
            spec = spec_of(with_values(config, any_ids(config)))
            adapters.add("default", spec, blank=True, starting=True)
    except UserError as error:
        error.message = f"{setting.name}: {error.message}"
        raise
    sizes = [p.numel() for p in adapters.parameters()]
    adapters.detach()
    peak, why = peak_of(config, model.config) if memory else (None, "")
    return Planned(
        name=setting.name,
        trainable=sum(sizes) - head,
        total=sum(p.numel() for p in model.parameters()),
        state=sum(state_bytes(config.train.optimizer, size) for size in sizes),
        memory=peak,
        steps=steps_of(config, rows),
        why=why,
    )


def peak_of(config: RunConfig, about: Any) -> tuple[int | None, str]:
    """The predicted peak; None with the reason for a classifier, or where a model's step depends on numbers."""
    if config.task == "classification":
        return None, "not predicted"
    context = int(getattr(text_config(about), "max_position_embeddings", None) or UNLIMITED)
    choice = open_choice(config)
    try:
        predictor = Predictor(config, about).at(choice.tier)
        return predictor.predict(assumed(config, context).batches(choice.tokens)).allocated, ""
    except UserError as error:
        return None, error.message


def rows_of(study: Study, *, offline: bool) -> int | None:
    """Rows to train on; None where no setting's steps depend on them, or they would have to be fetched."""
    configs = [study.config(setting) for setting in study.settings]
    sources = [source.path for source in configs[0].data.train]
    if all(config.train.max_steps is not None for config in configs):
        return None
    if study.file.made is None and any(
        path == NO_DATA or path.startswith(("hf:", "glue:")) for path in sources
    ):
        return None
    return split_data(configs[0], made=study.file.made, offline=offline)[0].sizes["train"]


def steps_of(config: RunConfig, rows: int | None) -> int | None:
    """Optimizer steps; None where they depend on data that is not there, or on its tokens."""
    train = config.train
    if train.max_steps is not None:
        return train.max_steps
    if rows is None or train.batch_tokens is not None:
        return None
    return math.ceil(rows * train.epochs / (train.batch_size or DEFAULT_BATCH))


def check_expected(study: Study, counts: Mapping[str, int]) -> None:
    """The trained weights must be as many as the study says."""
    wrong = [
        f"{name}: {counts[name]:,} weights train, {wanted:,} are expected"
        for name, wanted in study.file.expected.items()
        if counts[name] != wanted
    ]
    if wrong:
        raise UserError(
            f"{study.path.name}: the trained weights are not as many as `expected` says",
            details=wrong,
            hint="set r, target_modules or `expected` right; the counts depend on the model",
        )
