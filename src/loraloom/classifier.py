"""A sequence classifier: its new head, its loss, its answers.

The head is what transformers puts on top of the base model: `classifier`, `score`, `pooler` ... It is trained whole
beside the adapter, from a start that a seed decides.

    loss = sum over rows of -log softmax(logits)[label]     or (logit - label)^2 for numbers, over the step's rows

shapes  B rows, C outputs
source  tests/test_classify.py: PEFT gives the same logits and gradients from the same folder
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapt import Adapters
from .config import ModelConfig
from .data import Labels
from .errors import NonFinite, UserError
from .model import Base, Loaded, find_base, load_model
from .nll import evaluating, parameters_of
from .padded import Padded, pad_rows
from .skeleton import CLASSIFIER, meta_model, read_shape

FAR = 1 << 20  # tokens: a tokenizer that names more names no limit


# ==== loss and answers =======================================================================================


def row_losses(logits_BC: Tensor, label_B: Tensor) -> Tensor:
    """The loss of each row, float32 (float64 for float64): nats of its class, or the squared error of one output."""
    logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
    if logits_BC.shape[-1] == 1:
        return (logits_BC[:, 0] - label_B.to(logits_BC.dtype)) ** 2
    return functional.cross_entropy(logits_BC, label_B.long(), reduction="none")


def loss_sum(model: nn.Module, batch: Padded) -> Tensor:
    """The losses of a batch's rows, summed; what step.accumulate takes the gradient of."""
    return row_losses(logits_of(model, batch), batch.label).sum()


def logits_of(model: nn.Module, batch: Padded) -> Tensor:
    """(B, C) of a batch on the model's device; which text a token is of goes only to models that ask."""
    given = batch.inputs
    if "token_type_ids" not in parameters_of(type(model).forward):  # a tokenizer may write them all the same
        given.pop("token_type_ids", None)
    found: Tensor = model(**given).logits
    return found


@torch.no_grad()
def broken_rows(model: nn.Module, adapters: Adapters, batches: Sequence[Padded], step: int) -> list[str]:
    """The rows whose loss is not finite, each tried alone."""
    device = next(model.parameters()).device
    bad: list[str] = []
    for batch in batches:
        for one in batch.to(device).alone():
            with adapters.batch(step=step, token_BT=one.token):
                finite = bool(row_losses(logits_of(model, one), one.label).isfinite().all())
            if not finite:
                bad += one.rows
    return bad


def predict(
    model: nn.Module,
    examples: Sequence[Any],
    *,
    pad_id: int,
    micro_tokens: int,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """logits_nC of the model as it is now, float64, on the CPU, in the order given.

    raises  NonFinite with the rows whose logits are not finite
    """
    device = next(model.parameters()).device
    parts: list[Tensor] = []
    order: list[int] = []
    with evaluating(model):
        for batch in pad_rows(examples, micro_tokens=micro_tokens, pad_id=pad_id):
            parts.append(logits_of(model, batch.to(device)).double())
            order += batch.members
            if on_batch:
                on_batch(len(batch.rows))
    found = torch.cat(parts).cpu()
    logits_nC = torch.empty_like(found)
    logits_nC[torch.tensor(order)] = found
    bad = (~logits_nC.isfinite().all(-1)).nonzero().flatten().tolist()
    if bad:
        raise NonFinite(
            f"the answer to {len(bad)} rows is not a finite number",
            details=[examples[i].row for i in bad[:10]],
            hint="look at these rows; if all are broken, train a new run with a lower train.learning_rate",
        )
    return logits_nC


# ==== the model ==============================================================================================


def load_classifier(
    config: ModelConfig,
    labels: Labels,
    *,
    seed: int,
    base: Base | None = None,
    offline: bool = False,
    progress: bool = True,
) -> Loaded:
    """A base with a head for these labels. What of the head the checkpoint does not hold is drawn by the seed.

    raises  UserError as `load_model`, or if transformers has no classifier of this kind
    """
    base = base or find_base(config, offline=offline, progress=progress)
    skeleton = shape_of(base.source.path, labels)
    heads = head_names(skeleton)
    plain = config.attention == "auto" and not skeleton._supports_sdpa
    config = config.model_copy(update={"attention": "eager"}) if plain else config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loaded = load_model(
            config,
            base=base,
            task="classify",
            new_weights=[f"{name}." for name in heads],
            keep=heads,
            progress=progress,
            **labels.settings(),
        )
    text = loaded.model.config.get_text_config()
    if text.pad_token_id is None:  # a decoder reads the last token that is no padding
        text.pad_token_id = loaded.model.config.pad_token_id = loaded.pad_id
    return replace(loaded, attention="eager: transformers has no other for this model") if plain else loaded


def shape_of(folder: Path, labels: Labels) -> Any:
    """The classifier of a model folder on the meta device.

    raises  UserError if transformers has none of this kind
    """
    return meta_classifier(read_shape(folder), labels)


def meta_classifier(config: Any, labels: Labels, dtype: torch.dtype = torch.float32) -> Any:
    """The classifier of a config on the meta device.

    raises  UserError if transformers has none of this kind
    """
    config = copy.deepcopy(config)
    for key, value in labels.settings().items():
        if key != "num_labels":  # which the names give
            setattr(config, key, value)
    if labels.numbers:
        config.num_labels = 1
    return meta_model(config, dtype=dtype, attention="eager", factory=CLASSIFIER)


def head_names(model: nn.Module) -> list[str]:
    """The top modules that are no part of the base model: the head, with whatever pools for it.

    raises  UserError if there is none
    """
    base = model.base_model_prefix
    names = [
        name
        for name, module in model.named_children()
        if name != base and any(True for _ in module.parameters())
    ]
    if not names or not hasattr(model, str(base)):
        raise UserError(f"{type(model).__name__} has no head that can be told from its base")
    return names


def head_size(model: nn.Module) -> int:
    """Weights of the head, which trains whole beside an adapter; no paper counts them to the adapter."""
    return sum(p.numel() for name in head_names(model) for p in getattr(model, name).parameters())


def longest_input(model: Any, tokenizer: Any) -> int:
    """Tokens that the model takes at most, special ones included.

    RoBERTa's positions begin behind the padding's own, so its table of 514 is for 512 tokens.
    """
    limits = [int(getattr(tokenizer, "model_max_length", FAR) or FAR)]
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    for table in tables:
        if isinstance(table, nn.Embedding):
            before = 0 if table.padding_idx is None else table.padding_idx + 1
            limits.append(table.num_embeddings - before)
    if not any(isinstance(table, nn.Embedding) for table in tables):
        config = model.config.get_text_config()
        relative = getattr(config, "relative_attention", False)  # DeBERTa's positions have no end
        limits.append(FAR if relative else int(getattr(config, "max_position_embeddings", None) or FAR))
    return min(limits)
