"""From settings to what a training loop works with: model, data, adapters, optimizer, plan.

Everything that was `auto` is decided here, with the reason, and stored in the run's settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .adapt import Adapters
from .adapter import AdapterSpec
from .config import RunConfig, with_values
from .data import Examples, Prepared, Style, check_sources, prepare
from .errors import DataError, UserError
from .files import digest
from .generate import context_length
from .kernels.twin import path_of
from .model import Loaded, load_model
from .nll import honours_boundaries
from .optim import make_optimizer
from .packing import StepPlan

DEFAULT_BATCH = 16  # examples a step, if neither batch_size nor batch_tokens is set
UNLIMITED = 1 << 20  # tokens, for a model that names no limit


Fit = Callable[[RunConfig, Loaded, Examples, StepPlan], int]


@dataclass
class Workshop:
    """Everything a run works with. The model is frozen and in eval mode; only adapters train."""

    config: RunConfig
    loaded: Loaded
    adapters: Adapters
    prepared: Prepared
    optimizer: torch.optim.Optimizer
    plan: StepPlan
    decided: dict[str, Any]  # dotted settings that were `auto`

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def train(self) -> Examples:
        return self.prepared.train

    @property
    def eval(self) -> Examples:
        return self.prepared.eval

    @property
    def evaluates(self) -> bool:
        return len(self.prepared.eval) > 0

    @property
    def style(self) -> Style:
        return Style.from_dict(self.prepared.report.style)

    @property
    def kernels(self) -> str:
        """Which kernels this device runs, and why."""
        return ": ".join(path_of(self.loaded.device))

    @property
    def packing(self) -> bool:
        return self.config.data.packing

    @property
    def micro_tokens(self) -> int:
        assert isinstance(self.config.train.micro_tokens, int)
        return self.config.train.micro_tokens

    @property
    def eval_every(self) -> int:
        assert self.config.eval.every != "auto"
        return self.config.eval.every

    @property
    def pad_id(self) -> int:
        return self.loaded.pad_id

    @property
    def stop_ids(self) -> Sequence[int]:
        return self.loaded.stop_ids

    @cached_property
    def base_norms(self) -> dict[str, float]:
        """||W|| of each adapted layer by its key: the base is frozen, so once is enough."""
        adapter = next(iter(self.adapters.adapters.values()))
        return {key: float(site.layer.weight().float().norm()) for key, site in adapter.sites.items()}

    def data_digest(self) -> str:
        """Of every token and label, trained on or held out: a resumed run must see the same."""
        parts = [
            tensor for side in (self.train, self.eval) for tensor in (side.ids, side.trained, side.offsets)
        ]
        return digest(*(part.numpy().tobytes() for part in parts))


def build(
    config: RunConfig,
    *,
    offline: bool = False,
    cache: Path | None = None,
    progress: bool = True,
    fit: Fit | None = None,
) -> Workshop:
    """Load, read, attach and plan.

    fit  chooses the tokens of a pass where train.micro_tokens=fit

    raises  UserError, DataError: whatever of the settings, the data or the model does not fit
    """
    check_sources(config.data)  # a wrong path or method is said before a large model is loaded
    spec_of(config).make()
    loaded = load_model(config.model, keep=config.modules_to_save, offline=offline, progress=progress)
    prepared = prepare(
        config.data,
        loaded.tokenizer,
        model_max_length=context_length(loaded.model) or UNLIMITED,
        seed=config.train.seed,
        cache=cache,
        progress=progress,
    )
    if not prepared.train.targets.any():
        raise DataError("no token of the training set carries loss", hint="look at `loraloom data`")
    if config.data.packing:
        refuse_leaks(loaded)
    adapters = Adapters(loaded.model)
    adapter = adapters.add("default", spec_of(config))
    if config.bias != "none" and not any(name.endswith("bias") for name, _ in adapters.overlaid("default")):
        raise UserError(
            f"bias is {config.bias}, and there is no bias to train in this {type(loaded.model).__name__}",
            hint="--set bias=none",
        )
    adapters.train()
    if config.train.gradient_checkpointing:
        checkpoint_layers(loaded.model)
    plan = StepPlan(
        prepared.train.lengths,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        batch_size=config.train.batch_size or (None if config.train.batch_tokens else DEFAULT_BATCH),
        batch_tokens=config.train.batch_tokens,
        seed=config.train.seed,
    )
    decided = decide(config, adapter.method.learning_rate, len(plan), loaded)
    if config.train.micro_tokens == "fit":
        if fit is None or loaded.device.type != "cuda":
            raise UserError(
                f"train.micro_tokens=fit needs a GPU to fit into, and this run is on {loaded.device}",
                hint="set a number, or auto",
            )
        decided["train.micro_tokens"] = fit(config, loaded, prepared.train, plan)
    config = with_values(config, decided)
    assert config.train.learning_rate != "auto"
    optimizer = make_optimizer(adapters.groups(config.train.learning_rate), config.train)
    return Workshop(config, loaded, adapters, prepared, optimizer, plan, decided)


def spec_of(config: RunConfig) -> AdapterSpec:
    """The adapter that the settings ask for."""
    options = {key: value for key, value in config.method.items() if key != "name"}
    return AdapterSpec(
        method=config.method.get("name", "lora"),
        options=options,
        r=config.r,
        alpha=config.alpha,
        dropout=config.dropout,
        target_modules=config.target_modules,
        layers=config.layers,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        bias=config.bias,
        modules_to_save=config.modules_to_save,
        seed=config.train.seed,
    )


def decide(config: RunConfig, rate: float, num_steps: int, loaded: Loaded) -> dict[str, Any]:
    """The values of the settings that are `auto`, by dotted name."""
    decided: dict[str, Any] = {}
    if config.train.learning_rate == "auto":
        decided["train.learning_rate"] = rate
    if config.train.micro_tokens == "auto":
        decided["train.micro_tokens"] = 8192 if loaded.device.type == "cuda" else 2048
    if config.eval.every == "auto":
        decided["eval.every"] = max(1, math.ceil(num_steps / 10))
    if config.train.batch_size is None and config.train.batch_tokens is None:
        decided["train.batch_size"] = DEFAULT_BATCH
    return decided


def refuse_leaks(loaded: Loaded) -> None:
    """Packing needs a model that keeps documents in one row apart: tried on the model itself.

    raises  UserError if it does not
    """
    why = honours_boundaries(loaded.model, loaded.model.get_input_embeddings().weight.shape[0])
    if why is not None:
        raise UserError(f"packing cannot be used: {why}", hint="--set data.packing=false")


def checkpoint_layers(model: Any) -> None:
    """Gradient checkpointing in the decoder layers, while every module stays in eval mode otherwise.

    raises  UserError if the model has no layers that can
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(model).__name__} cannot recompute its layers",
            hint="--set train.gradient_checkpointing=false",
        )
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:  # its name in transformers before 5.23
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # transformers recomputes only then; the modules below stay in eval mode
            for name, value in list(vars(module).items()):
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)  # the base trains without dropout, recomputed or not
