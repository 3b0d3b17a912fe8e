"""Nats of every labelled token of a batch: the loss that training minimises and evaluation reports.

The model is called with token ids and, in packed rows, positions that restart at 0 in every document.
No attention mask and no cache are passed: transformers finds the documents in the positions only then.
`honours_boundaries` proves on the model itself that documents in one row do not see each other.

shapes  B rows, T tokens a row, L labelled tokens, U columns whose logits are computed, V vocabulary
source  tests/test_nll.py: packed rows equal their documents one by one in float64
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

NOT_A_TARGET = -100
LEAK = 0.05  # a share of what joining the two documents would change; a leak in one layer of many is more


def no_padding_hint(record: logging.LogRecord) -> bool:
    """Keep every log record but the hint of transformers to pass a mask where padding stands in the ids.

    Packed rows must have no mask, padding on the right needs none, and answers have one of their own.
    """
    return "passing in an `attention_mask` since your input_ids may be padded" not in record.getMessage()


logging.getLogger("transformers.modeling_utils").addFilter(no_padding_hint)


class BatchLike(Protocol):
    """What the loss reads of a packing.Batch: tensors (B, T) of int64."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def position(self) -> Tensor | None: ...


def token_nll(model: nn.Module, batch: BatchLike) -> tuple[Tensor, Tensor]:
    """(nll_L, index_L): the nats of each labelled token and its flat position row * T + column.

    Logits are computed only for the columns that predict a labelled token of some row.

    shapes  nll_L float32 (float64 for a float64 model), index_L int64 in rising order
    """
    labels_BT = batch.labels
    wanted_BT = labels_BT != NOT_A_TARGET
    wanted_BT[:, 0] = False  # nothing stands before the first token of a row
    row_L, column_L = wanted_BT.nonzero(as_tuple=True)
    column_U = wanted_BT.any(0).nonzero().squeeze(1) - 1  # position t predicts labels[t + 1]
    logits_BUV, place_T = some_logits(model, batch, column_U)
    logits_LV = logits_BUV[row_L, place_T[column_L - 1]]
    precise = torch.promote_types(logits_LV.dtype, torch.float32)
    nll_L = functional.cross_entropy(logits_LV.to(precise), labels_BT[row_L, column_L], reduction="none")
    return nll_L, row_L * labels_BT.shape[1] + column_L


def nll_sum(model: nn.Module, batch: BatchLike) -> Tensor:
    """The nats of all labelled tokens of a batch, one differentiable number."""
    return token_nll(model, batch)[0].sum()


def some_logits(model: nn.Module, batch: BatchLike, column_U: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of some columns, and for each column of the batch its place among them.

    A model that cannot leave columns out gives all of them.
    """
    num_columns = batch.ids.shape[1]
    place_T = torch.arange(num_columns, device=batch.ids.device)
    arguments: dict[str, Any] = {"input_ids": batch.ids}
    if takes(model, "use_cache"):
        arguments["use_cache"] = False
    if batch.position is not None:
        arguments["position_ids"] = batch.position
    # Where nearly every column is wanted by some row, a copy of the hidden states gains nothing.
    if "logits_to_keep" in parameters_of(type(model).forward) and 0 < len(column_U) <= 0.9 * num_columns:
        arguments["logits_to_keep"] = column_U
        place_T[column_U] = torch.arange(len(column_U), device=column_U.device)
    output = model(**arguments)
    return getattr(output, "logits", output), place_T


@cache
def parameters_of(forward: Callable[..., Any]) -> frozenset[str]:
    """The names of the arguments that a model's forward declares; "**" if it takes others too."""
    parameters = inspect.signature(forward).parameters.values()
    return frozenset("**" if one.kind == one.VAR_KEYWORD else one.name for one in parameters)


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model can be called with this argument; it may still ignore it."""
    return not {argument, "**"}.isdisjoint(parameters_of(type(model).forward))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; every module then has the mode it had before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def honours_boundaries(model: nn.Module, vocab_size: int) -> str | None:
    """None if documents packed in one row do not see each other, else the reason in words.

    Two short documents of random tokens share a row. The second one's logits must not move when the first
    one changes, and must be those of the second one alone. Both are measured against what joining the two
    into one document does, so that the answer does not depend on the model's size, weights or dtype.
    """
    name = type(model).__name__
    if not takes(model, "position_ids"):
        return f"{name} takes no position_ids, so it cannot tell documents in a row apart"
    device = next(model.parameters()).device
    first, other, second = probe_documents(vocab_size, device)
    apart = torch.cat([torch.arange(first.shape[1]), torch.arange(second.shape[1])]).to(device)[None]
    joined = torch.arange(apart.shape[1], device=device)[None]
    keep = second.shape[1]
    with evaluating(model):
        packed = tail_logits(model, torch.cat([first, second], 1), apart, keep)
        packed_other = tail_logits(model, torch.cat([other, second], 1), apart, keep)
        one = tail_logits(model, torch.cat([first, second], 1), joined, keep)
        one_other = tail_logits(model, torch.cat([other, second], 1), joined, keep)
        alone = tail_logits(model, second, None, keep)
    leak, at_most = rms(packed - packed_other), LEAK * rms(one - one_other)
    if not leak <= at_most:
        return f"{name} lets a document see the one before it in the row (its logits move by {leak:.2g})"
    shift, noise = rms(packed - alone), 4 * torch.finfo(next(model.parameters()).dtype).eps * rms(alone)
    if not shift <= max(noise, LEAK * rms(one - alone)):
        return f"{name} gives a packed document other logits than alone (they move by {shift:.2g})"
    return None


def probe_documents(vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Three documents (1, T) of random tokens, always the same; the first two are equally long."""
    generator = torch.Generator().manual_seed(0)

    def document(length: int) -> Tensor:
        return torch.randint(vocab_size, (1, length), generator=generator).to(device)

    return document(11), document(11), document(9)


def tail_logits(model: nn.Module, ids: Tensor, position: Tensor | None, keep: int) -> Tensor:
    """The logits of the last `keep` tokens of a row, (keep, V) in float64 on the CPU."""
    arguments: dict[str, Any] = {} if position is None else {"position_ids": position}
    if takes(model, "use_cache"):
        arguments["use_cache"] = False
    output = model(input_ids=ids, **arguments)
    return getattr(output, "logits", output)[0, -keep:].cpu().double()


def rms(values: Tensor) -> float:
    """The root of the mean square."""
    return float(values.square().mean().sqrt())
