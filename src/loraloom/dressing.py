"""Texts as the adapter in use wants to read them: with its own tokens before them and before their answer.

Only prefix methods have such tokens. Texts are dressed where they enter the model, so that data, the base's
own answers and everything that is stored know nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from .adapt import Adapters
from .errors import UserError
from .packing import IGNORED, Example
from .targets import vocabulary


@dataclass(frozen=True)
class Dressed:
    """An example with the adapter's tokens in it; they carry no loss."""

    ids: list[int]
    labels: list[int]
    row: str

    @property
    def targets(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)


def adapters_of(model: nn.Module) -> Adapters | None:
    """The adapters that hang on a model."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Adapters)), None)


@contextmanager
def holding(model: nn.Module) -> Iterator[None]:
    """Build what the adapters in use compute once, for many passes without gradients."""
    adapters = adapters_of(model)
    if adapters is None or adapters.merged or adapters.held:
        yield
        return
    with adapters.hold():
        yield


def tokens_of(model: nn.Module) -> tuple[list[int], list[int]]:
    """The ids of the prefix and of the infix of the adapter in use; none as a rule.

    raises  UserError if several adapters are in use and one of them has such tokens
    """
    adapters = adapters_of(model)
    active = adapters.active if adapters is not None else ()
    counts = [adapters.adapters[name].method.inserts() for name in active] if adapters is not None else []
    if not any(map(any, counts)):
        return [], []
    if len(counts) > 1:
        raise UserError(
            f"{', '.join(active)}: an adapter with prefix tokens cannot be used together with others",
            hint="use one at a time",
        )
    first, (before, between) = vocabulary(model), counts[0]
    return list(range(first, first + before)), list(range(first + before, first + before + between))


def dress_prompts(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts with the tokens of the adapter in use: prefix, prompt, infix."""
    prefix, infix = tokens_of(model)
    return [[*prefix, *ids, *infix] for ids in prompts]


def dress(model: nn.Module, examples: Sequence[Example]) -> Sequence[Example]:
    """Examples with the tokens of the adapter in use; the infix stands before the last run of trained tokens."""
    return dresser(model)(examples)


def dresser(model: nn.Module) -> Callable[[Sequence[Example]], Sequence[Example]]:
    """`dress` for the adapter in use now, whichever is in use when it is called."""
    prefix, infix = tokens_of(model)
    if not prefix and not infix:
        return lambda examples: examples
    return lambda examples: [with_tokens(example, prefix, infix) for example in examples]


def with_tokens(example: Example, prefix: list[int], infix: list[int]) -> Dressed:
    ids, labels = list(example.ids), list(example.labels)
    at = last_answer(labels)
    return Dressed(
        [*prefix, *ids[:at], *infix, *ids[at:]],
        [IGNORED] * len(prefix) + labels[:at] + [IGNORED] * len(infix) + labels[at:],
        example.row,
    )


def last_answer(labels: Sequence[int]) -> int:
    """Where the last run of trained tokens starts; 0 if none is trained."""
    stop = len(labels)
    while stop and labels[stop - 1] == IGNORED:
        stop -= 1
    while stop and labels[stop - 1] != IGNORED:
        stop -= 1
    return stop
