"""A run with labels: what `workshop` and `train` do for text, where it differs.

The step, the optimizer, checkpoints, stopping and resuming are the same. There is no packing, since a classifier gives
one answer a row, and nothing that is made for causal models: fused layers, CUDA graphs, plans of a GPU's memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .adapt import Adapters
from .checkpoint import Progress, save_best
from .classifier import (
    broken_rows,
    head_names,
    load_classifier,
    longest_input,
    loss_sum,
    predict,
    row_losses,
    shape_of,
)
from .config import RunConfig, with_values
from .data import Labelled, Labels, prepare_labels
from .data.labelled import check_labelled_sources, glue_task
from .errors import UserError
from .kernels.twin import path_of
from .methods.base import Method
from .metrics import CLASS_METRICS, NUMBER_METRICS, of_classes, of_numbers
from .model import Loaded, find_base
from .opening import Tell, tell_data, tell_method, tell_model, unheard
from .optim import make_optimizer
from .padded import Padded, pad_rows
from .recompute import Choice
from .rundir import Run
from .step import accumulate
from .task import Listen, Task
from .workshop import Fit, Workshop, check_biases, decide, decided_by, plan_of, spec_of, usual_tokens

NOT_HERE: Mapping[str, tuple[Callable[[Any], bool], str]] = {  # when a setting is wrong, and why
    "train.fast": (lambda on: on is True, "fused layers are those of causal models"),
    "train.compile": (bool, "compiled layers are those of causal models"),
    "train.graphs": (lambda on: on is True, "CUDA graphs replay packed rows of text"),
    "train.micro_tokens": (
        lambda tokens: tokens == "fit",
        "the plan of a GPU's memory knows causal models alone; set a number, or auto",
    ),
    "train.recompute": (lambda tier: tier not in ("none", "auto"), "only decoder layers are computed again"),
    "model.attention": (lambda name: name == "varlen", "documents in one row are for packed text"),
    "eval.prompts": (bool, "a classifier answers with a label"),
}


def build(
    config: RunConfig,
    *,
    offline: bool = False,
    cache: Path | None = None,
    progress: bool = True,
    fit: Fit | None = None,
    fresh: bool = True,
    tell: Tell = unheard,
) -> Workshop:
    """Load, read, attach and plan, as `workshop.build` does for text.

    cache, fit  are not used: short texts are tokenised in seconds, and no plan is made for a GPU

    raises  UserError, DataError: whatever of the settings, the data or the model does not fit
    """
    check_labelled_sources(config.data, offline=offline)
    refuse_settings(config)
    method = spec_of(config).make()
    refuse_method(config, method)
    base = find_base(config.model, offline=offline, progress=progress)
    tell_model(tell, config, base)
    limit = longest_of(base.source.path, base.tokenizer)
    prepared = prepare_labels(
        config.data,
        base.tokenizer,
        model_max_length=limit,
        seed=config.train.seed,
        offline=offline,
        progress=progress,
    )
    tell_data(tell, prepared.report)
    labels = Labels(tuple(prepared.report.labels))
    loaded = load_classifier(config.model, labels, seed=config.train.seed, base=base, progress=progress)
    decided: dict[str, Any] = trained_head(config, method, loaded.model)
    decided |= {"eval.best": best_of(config, labels)}
    config = with_values(config, decided)
    adapters = Adapters(loaded.model)
    adapter = adapters.add("default", spec_of(config), blank=not fresh)
    check_biases(config, adapters)
    plan = plan_of(config, prepared.train.lengths)
    adapter.method.check_steps(len(plan))
    decided |= decide(config, adapter.method, len(plan))
    kept = Choice("none", usual_tokens(config, loaded.device.type), "only decoder layers are computed again")
    decided |= decided_by(kept, config)
    decided |= {"data.packing": False} if config.data.packing else {}
    adapter.ready = True
    adapters.train()
    config = with_values(config, decided)
    tell_method(tell, config, adapters)
    assert config.train.learning_rate != "auto"
    optimizer = make_optimizer(adapters.groups(config.train.learning_rate), config.train)
    words = in_words(loaded, labels, kept)
    return Workshop(config, loaded, adapters, prepared, optimizer, plan, decided, words)


def planned(config: RunConfig, model: Any) -> RunConfig:
    """The settings with the head, as `build` would have them; refused as it would."""
    method = spec_of(config).make()
    refuse_settings(config)
    refuse_method(config, method)
    return with_values(config, trained_head(config, method, model))


def trained_head(config: RunConfig, method: Method, model: Any) -> dict[str, Any]:
    """The setting by which the head trains too, where the method does not train everything."""
    whole = method.trains_whole() == "everything"
    heads = [name for name in head_names(model) if not whole and name not in config.modules_to_save]
    return {"modules_to_save": [*config.modules_to_save, *heads]} if heads else {}


def longest_of(folder: Path, tokenizer: Any) -> int:
    """Tokens that the classifier of a folder takes at most: known before its weights are read, or its labels."""
    return longest_input(shape_of(folder, Labels(("0", "1"))), tokenizer)


def refuse_settings(config: RunConfig) -> None:
    """raises  UserError for a setting that only text can have"""
    for name, (wrong, why) in NOT_HERE.items():
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        if wrong(value):
            raise UserError(f"{name}={value} cannot be had with task=classification: {why}")


def refuse_method(config: RunConfig, method: Method) -> None:
    """raises  UserError for a method that works on the tokens of a text, or must see text first"""
    name = config.method.get("name", "lora")
    if sum(method.inserts()) or method.per_token:
        raise UserError(f"{name} works on tokens of a text, which a classifier's rows do not have")
    if method.needs is not None:
        raise UserError(
            f"{name} must see text, or the weights before quantisation: that is made for causal models"
        )


def best_of(config: RunConfig, labels: Labels) -> str:
    """What the best adapter is best in.

    raises  UserError for a metric that these labels do not have
    """
    known = NUMBER_METRICS if labels.numbers else CLASS_METRICS
    wanted = config.eval.best
    if wanted == "auto":
        task = glue_task(config.data)
        return task.metric if task is not None else known[0]
    if wanted != "loss" and wanted not in known:
        what = "numbers" if labels.numbers else "classes"
        raise UserError(
            f"eval.best={wanted} is not for labels that are {what}",
            hint=f"it can be loss, {', '.join(known)}",
        )
    return wanted


def in_words(loaded: Loaded, labels: Labels, kept: Choice) -> dict[str, str]:
    """What computes a step of this run."""
    return {
        "kernels": ": ".join(path_of(loaded.device)),
        "attention": loaded.attention,
        "layers": "the model's own code",
        "loss": "squared error" if labels.numbers else "cross-entropy of the classes",
        "recompute": f"{kept.tier}: {kept.reason}",
        "graphs": "off: rows with labels are not packed",
    }


# ==== while training =========================================================================================


def packer(shop: Workshop) -> Callable[[int], list[Padded]]:
    """What makes the micro-batches of a step."""

    def make(step: int) -> list[Padded]:
        examples = [shop.train[i] for i in shop.plan[step]]
        return pad_rows(examples, micro_tokens=shop.micro_tokens, pad_id=shop.pad_id)

    return make


def evaluate_now(shop: Workshop, run: Run, progress: Progress, listen: Listen) -> None:
    """Loss and metrics on the held-out rows; the best adapter so far is kept."""
    if not shop.evaluates:
        return
    began = time.monotonic()
    shop.adapters.eval()
    try:
        with shop.adapters.hold():
            measured = measure(shop)
    finally:
        shop.adapters.train()
    best = shop.config.eval.best
    record = {
        "kind": "eval",
        "step": progress.step,
        **measured,
        "targets": len(shop.eval),
        "metric": best,
        "seconds": time.monotonic() - began,
    }
    run.log(record)
    listen("eval", record)
    if progress.note(measured["loss"], score=None if best == "loss" else (best, measured[best])):
        save_best(shop, run, progress)


def measure(shop: Workshop) -> dict[str, float]:
    """Loss and every metric of the model as it is now."""
    assert isinstance(shop.prepared, Labelled)
    labels = Labels(tuple(shop.prepared.report.labels))
    logits_nC = predict(shop.model, shop.eval, pad_id=shop.pad_id, micro_tokens=shop.micro_tokens)
    return measured_on(logits_nC, shop.eval.labels, labels)


def measured_on(logits_nC: torch.Tensor, label_n: torch.Tensor, labels: Labels) -> dict[str, float]:
    """Loss and metrics by name."""
    found = {"loss": float(row_losses(logits_nC, label_n).mean())}
    if labels.numbers:
        answers = logits_nC[:, 0].tolist()
        return found | {name: of_numbers(name, label_n.tolist(), answers)[0] for name in NUMBER_METRICS}
    told, given = label_n.long().tolist(), logits_nC.argmax(-1).tolist()
    return found | {name: of_classes(name, told, given, len(labels.names))[0] for name in CLASS_METRICS}


TASK = Task(packer, partial(accumulate, loss_sum=loss_sum), broken_rows, evaluate_now)
