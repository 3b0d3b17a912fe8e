"""The heaviest micro-batches of a run: from its data, or made up where there is none.

Memory depends on the rows of a batch, their length, whether documents share them, and how many tokens carry loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from itertools import chain
from typing import Protocol

from .config import RunConfig
from .data import Examples
from .packing import DEFAULT_BATCH, IGNORED, Batch, Example, StepPlan, batch, pack, row_length_for

MIXES = 6  # full passes that are tried for the one that needs most
LONG = 512  # tokens of a document that attention may take by itself
LOOKED_AT = 40  # steps whose batches are packed to find the heaviest, beside the one with the longest example


class Workload(Protocol):
    """What a run's steps consist of."""

    @property
    def step_tokens(self) -> int | None:
        """Most tokens that one optimizer step can use; None if unknown."""

    @property
    def usual_step(self) -> int | None:
        """Tokens of a usual step, or the most it can have where there is no data; None if unknown."""

    def batches(self, micro_tokens: int) -> list[Batch]:
        """The heaviest micro-batch, twice if a step may have several."""

    def fullest(self, micro_tokens: int) -> Iterator[list[Batch]]:
        """Micro-batches as full as any, each twice: of mixes of documents, since memory depends on the mix."""

    def words(self, micro_tokens: int) -> str:
        """What a pass holds."""


@dataclass(frozen=True)
class Made:
    """An example of some length, every token of which but the first carries loss."""

    ids: list[int]
    row: str = "made up"

    @property
    def labels(self) -> list[int]:
        return [IGNORED, *self.ids[1:]]

    @property
    def targets(self) -> int:
        return len(self.ids) - 1


@dataclass(frozen=True)
class Assumed:
    """Rows that are full, two documents to a packed row, all with loss: the most that a pass can take.

    longest  tokens of the longest example; None: as long as a pass, at most what the model takes
    """

    longest: int | None
    context: int
    packing: bool
    step_tokens: int | None = None

    def rows(self, micro_tokens: int) -> tuple[int, int]:
        """Rows and their length: together all the tokens of a pass, or of a step if that has fewer."""
        longest = min(self.longest or micro_tokens, self.context)
        if self.packing and longest <= micro_tokens:
            longest = min(row_length_for(longest, micro_tokens), self.context)
        most = max(longest, min(micro_tokens, self.step_tokens or micro_tokens))
        count = -(-most // longest)
        return count, most // count

    def batches(self, micro_tokens: int) -> list[Batch]:
        count, length = self.rows(micro_tokens)
        size = max(1, length // 2) if self.packing and length > 3 else length
        documents = [Made([1] * size), Made([1] * (length - size))] if size < length else [Made([1] * length)]
        made = batch(
            [list(enumerate(documents)) for _ in range(count)], 0, length=length if self.packing else None
        )
        whole_step = self.step_tokens is not None and self.step_tokens <= count * length
        return [made] if whole_step else [made, made]

    @property
    def usual_step(self) -> int | None:
        return self.step_tokens

    def fullest(self, micro_tokens: int) -> Iterator[list[Batch]]:
        yield replace(self, step_tokens=None).batches(micro_tokens)

    def words(self, micro_tokens: int) -> str:
        count, length = self.rows(micro_tokens)
        packed = ", two documents each" if self.packing else ""
        return f"{count} {'row' if count == 1 else 'rows'} of {length:,} tokens{packed}; all carry loss"


class Measured:
    """The batches that the run's own examples are packed into."""

    step_tokens: int | None
    usual_step: int | None

    def __init__(self, examples: Examples, plan: StepPlan, *, packing: bool) -> None:
        self.packing = packing
        lengths = plan.lengths
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        steps = [plan[number] for number in range(min(LOOKED_AT, len(plan)))]
        if not any(longest in step for step in steps):
            steps.append([longest, *steps[0][1:]])
        self.steps: list[Sequence[Example]] = [[examples[i] for i in step] for step in steps]
        self.step_tokens = max(sum(len(one.ids) for one in step) for step in self.steps) * 2  # with padding
        self.usual_step = plan.usual

    def batches(self, micro_tokens: int) -> list[Batch]:
        packed = self.packed(self.steps, micro_tokens)
        heaviest = max(chain(*packed), key=weight)
        return [heaviest] * (2 if any(len(step) > 1 for step in packed) else 1)

    def fullest(self, micro_tokens: int) -> Iterator[list[Batch]]:
        """Of the steps that were looked at, and of all their examples together."""
        together = [one for step in self.steps for one in step]
        for steps in (self.steps, [together]):
            for made in nlargest(MIXES, chain(*self.packed(steps, micro_tokens)), key=weight):
                yield [made] * 2

    def packed(self, steps: Sequence[Sequence[Example]], micro_tokens: int) -> list[list[Batch]]:
        return [pack(step, micro_tokens=micro_tokens, packing=self.packing, pad_id=0) for step in steps]

    def words(self, micro_tokens: int) -> str:
        made = self.batches(micro_tokens)[0]
        rows, length = made.ids.shape
        share = made.targets / made.ids.numel()
        return f"the heaviest has {rows} {'row' if rows == 1 else 'rows'} of {length:,} tokens; {share:.0%} carry loss"


def weight(made: Batch) -> tuple[int, int, int]:
    """An order by memory: of long documents each length may have an attention call, and copies, of its own."""
    lengths = {stop - start for _, start, stop in made.spans}
    return made.ids.numel(), sum(length for length in lengths if length >= LONG), made.targets


def assumed(config: RunConfig, context: int, longest: int | None = None) -> Assumed:
    """What the settings say about batches where there is no data."""
    length = config.data.max_length
    longest = longest or (length if isinstance(length, int) else None)
    examples = None if config.train.batch_tokens else config.train.batch_size or DEFAULT_BATCH
    tokens = config.train.batch_tokens or (examples * longest if longest and examples else None)
    return Assumed(longest, context, config.data.packing, tokens)
