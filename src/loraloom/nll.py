"""Nats of every labelled token of a batch: the loss that training minimises and evaluation reports.

Logits are taken in chunks of hidden states (head.py) where the model is proved to do no more with them than that;
else they are the model's own.

The model is called with token ids and, in packed rows, positions that restart at 0 in every document. A model whose
attention takes documents gets them; any other gets no attention mask, since transformers finds the documents in the
positions only then. No cache is passed.
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
from itertools import product
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import arguments_of
from .errors import UserError
from .head import Head, flows, hooked, listening, standing_aside
from .kernels.cross_entropy import bent
from .packing import Batch, Documents
from .targets import output_head, vocabulary

NOT_A_TARGET = -100
LEAK = 0.05  # a share of what joining the two documents would change; a leak in one layer of many is more
PROBED = 8  # tokens of each row that prove what a model's logits are


def no_padding_hint(record: logging.LogRecord) -> bool:
    """Keep every log record but the hint of transformers to pass a mask where padding stands in the ids.

    Packed rows must have no mask, padding on the right needs none, and answers have one of their own.
    """
    return "passing in an `attention_mask` since your input_ids may be padded" not in record.getMessage()


logging.getLogger("transformers.modeling_utils").addFilter(no_padding_hint)


class BatchLike(Protocol):
    """What the loss reads of a packing.Batch: tensors (B, T) of int64, and target_at (L,)."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def position(self) -> Tensor | None: ...
    @property
    def documents(self) -> Documents: ...
    @property
    def target_at(self) -> Tensor: ...


# ==== the loss ===============================================================================================


def token_nll(model: nn.Module, batch: BatchLike) -> tuple[Tensor, Tensor]:
    """(nll_L, index_L): the nats of each labelled token and its flat position row * T + column.

    Where gradients are recorded the logits of all labelled tokens are kept: `nll_sum` is what to train with.

    shapes  nll_L float32 (float64 for a float64 model), index_L int64 in rising order
    """
    head = "gradients are recorded" if torch.is_grad_enabled() else head_of(model, batch.ids)
    if isinstance(head, str):
        return whole_nll(model, batch), batch.target_at
    return head.token_nll(hidden_states(model, head, batch), batch), batch.target_at


def nll_sum(model: nn.Module, batch: BatchLike) -> Tensor:
    """The nats of all labelled tokens of a batch, one differentiable number."""
    head = head_of(model, batch.ids)
    if isinstance(head, str):
        return whole_nll(model, batch).sum()
    return head.nll_sum(hidden_states(model, head, batch), batch)


def hidden_states(model: nn.Module, head: Head, batch: BatchLike) -> Tensor:
    """What would enter the model's head, (B, T, h)."""
    with standing_aside(head.module) as entered:
        logits_of(model, batch)
    (hidden_BTh,) = entered  # once a pass, as was proved
    return hidden_BTh


def whole_nll(model: nn.Module, batch: BatchLike) -> Tensor:
    """nll_L by the model's own logits, all at once, for the columns that predict a labelled token of some row."""
    labels_BT = batch.labels
    wanted_BT = labels_BT != NOT_A_TARGET
    wanted_BT[:, 0] = False  # nothing stands before the first token of a row
    column_U = wanted_BT.any(0).nonzero().squeeze(1) - 1  # position t predicts labels[t + 1]
    logits_BUV, place_T = some_logits(model, batch, column_U)
    row_L, before_L = batch.target_at // labels_BT.shape[1], batch.target_at % labels_BT.shape[1] - 1
    logits_LV = logits_BUV[row_L, place_T[before_L.clamp_min(0)]]
    precise = torch.promote_types(logits_LV.dtype, torch.float32)
    label_L = labels_BT.flatten()[batch.target_at]
    return functional.cross_entropy(
        logits_LV.to(precise), label_L, reduction="none", ignore_index=NOT_A_TARGET
    )


def some_logits(model: nn.Module, batch: BatchLike, column_U: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of some columns, and for each column of the batch its place among them.

    A model that cannot leave columns out gives all of them.
    """
    num_columns = batch.ids.shape[1]
    # Where nearly every column is wanted by some row, a copy of the hidden states gains nothing.
    if "logits_to_keep" not in parameters_of(type(model).forward) or not (
        0 < len(column_U) <= 0.9 * num_columns
    ):
        return logits_of(model, batch), torch.arange(num_columns, device=batch.ids.device)
    place_T = torch.zeros(num_columns, dtype=torch.int64, device=batch.ids.device)
    place_T[column_U] = torch.arange(len(column_U), device=column_U.device)
    return logits_of(model, batch, logits_to_keep=column_U), place_T


def logits_of(model: nn.Module, batch: BatchLike, **more: Any) -> Tensor:
    """Call the model on a batch: the only call of it for a loss."""
    arguments: dict[str, Any] = {"input_ids": batch.ids, **more}
    if takes(model, "use_cache"):
        arguments["use_cache"] = False
    arguments |= arguments_of(model, batch.documents, batch.position, batch.ids)
    output = model(**arguments)
    logits: Tensor = getattr(output, "logits", output)
    return logits


# ==== whether a model's logits are what its head makes of hidden states ======================================


_heads: WeakKeyDictionary[nn.Module, tuple[Any, Head | str]] = WeakKeyDictionary()


def head_of(model: nn.Module, ids_BT: Tensor | None = None) -> Head | str:
    """The model's head, if its logits are proved to be what that makes of single hidden states; else why not.

    The model is run on a few tokens, once for each model and output layer.

    ids_BT  whose first columns are run, where rows matter to the adapters in use; random ones if None
    """
    name, module = type(model).__name__, output_head(model)
    if module is None or module is model:
        return f"{name} names no output layer"
    if hooked(module):
        return f"hooks on the output layer of {name} must see whole batches"
    known = _heads.get(model)
    if known is None or known[0] is not module:
        if ids_BT is None:
            some = max(2, vocabulary(model))  # a model without a table has two words at least
            ids_BT = probe_documents(some, next(model.parameters()).device)[0]
        known = _heads[model] = module, proved(model, module, probe_batch(ids_BT[:, :PROBED]))
    return known[1]


def why_whole_logits(model: nn.Module) -> str | None:
    """Why the loss takes a model's own logits, all at once, in words; None if it takes them in chunks."""
    head = head_of(model)
    return head if isinstance(head, str) else None


def probe_batch(ids_BT: Tensor) -> Batch:
    spans = [(b, 0, ids_BT.shape[1]) for b in range(len(ids_BT))]
    return Batch(ids_BT, ids_BT, None, torch.zeros_like(ids_BT), 0, [], spans)


def proved(model: nn.Module, module: nn.Module, batch: Batch) -> Head | str:
    """Run the model with its head and without, and compare; on shapes alone only these are compared."""
    name = type(model).__name__
    try:
        with evaluating(model), unseen(model):
            with unmoved(model), listening(module) as heard:
                logits = logits_of(model, batch)
            if len(heard) != 1 or heard[0][0].shape[:-1] != batch.ids.shape:
                return f"{name} does not call its output layer once, on all hidden states"
            hidden_BTh, y = heard[0]
            if logits.shape != y.shape:
                return f"{name} gives {list(logits.shape)} logits, its output layer {list(y.shape)}"
            probe = torch.linspace(-200, 200, 64, dtype=y.dtype, device=y.device).expand(*y.shape[:-1], -1)
            with unmoved(model):
                with standing_aside(module, probe.contiguous()) as entered:
                    made = logits_of(model, batch)
                if len(entered) != 1 or not near(entered[0], hidden_BTh, hidden_BTh.dtype):
                    return f"{name} gives its output layer something else when it is run again"
                at_N = torch.arange(batch.ids.numel(), device=batch.ids.device)
                y_NV, _ = Head(module, y.shape[-1]).output(hidden_BTh, at_N)
            for scale, cap in bends(model):
                same = near(bent(y_NV.double(), scale, cap), logits.flatten(0, 1), hidden_BTh.dtype)
                if same and near(made, bent(probe.double(), scale, cap), y.dtype):
                    return Head(module, y.shape[-1], scale, cap)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model says when its head gives what it does not expect
        return f"{name} cannot be run without its output layer ({type(error).__name__}: {error})"
    return f"{name} makes something of its output layer's logits that is neither a scale nor a tanh"


def bends(model: nn.Module) -> list[tuple[float, float | None]]:
    """Scales and caps of logits that the model's config may mean, all of them first, none last."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def numbers(*names: str) -> list[float]:
        values = (getattr(text, name, None) for name in names)
        return [float(v) for v in values if isinstance(v, float | int) and not isinstance(v, bool) and v > 0]

    caps = numbers("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    scales = numbers("logit_scale", "lm_head_multiplier")
    scales += [1 / value for value in numbers("logits_scaling")]
    return list(product([*scales, 1.0], [*caps, None]))


def near(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are one to rounding in a dtype; shapes are."""
    if a.is_meta or b.is_meta or a.shape != b.shape:
        return a.shape == b.shape
    return rms(a.double() - b.double()) <= max(8 * torch.finfo(dtype).eps, 1e-5) * rms(b.double())


@contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """What adapters count and remember of a pass is again what it was."""
    kept = [(flow, dict(vars(flow))) for flow in flows(model)]
    try:
        yield
    finally:
        for flow, values in kept:
            vars(flow).update(values)


@contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """No hooks run inside but those before the model as a whole: what others look at must be their data."""
    names = ("_forward_pre_hooks", "_forward_hooks")
    kept = [
        (module, name, vars(module)[name])
        for module in model.modules()
        for name in names[module is model :]
        if vars(module)[name]
    ]
    for module, name, hooks in kept:
        vars(module)[name] = type(hooks)()
    try:
        yield
    finally:
        for module, name, hooks in kept:
            vars(module)[name] = hooks


# ==== calling models =========================================================================================


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


# ==== whether documents in a row are apart ===================================================================


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
    two, one_only = (first.shape[1], keep), (apart.shape[1],)
    with evaluating(model):
        packed = tail_logits(model, torch.cat([first, second], 1), apart, keep, two)
        packed_other = tail_logits(model, torch.cat([other, second], 1), apart, keep, two)
        one = tail_logits(model, torch.cat([first, second], 1), joined, keep, one_only)
        one_other = tail_logits(model, torch.cat([other, second], 1), joined, keep, one_only)
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


def tail_logits(
    model: nn.Module, ids: Tensor, position: Tensor | None, keep: int, lengths: tuple[int, ...] | None = None
) -> Tensor:
    """The logits of the last `keep` tokens of a row, (keep, V) in float64 on the CPU.

    lengths  of the row's documents, for a model that takes them; None: it is called without
    """
    documents = None
    if lengths is not None:
        starts = torch.tensor([0, *lengths], device=ids.device).cumsum(0).to(torch.int32)
        documents = Documents(starts, lengths)
    arguments = arguments_of(model, documents, position, ids)
    if takes(model, "use_cache"):
        arguments["use_cache"] = False
    output = model(input_ids=ids, **arguments)
    return getattr(output, "logits", output)[0, -keep:].cpu().double()


def rms(values: Tensor) -> float:
    """The root of the mean square."""
    return float(values.square().mean().sqrt())
