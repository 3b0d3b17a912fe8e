"""Packing loses nothing, mixes nothing and respects its budget; the plan visits every example once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.packing import TOKENS, StepPlan, pack

PAD = 0


@dataclass(frozen=True)
class Item:
    ids: list[int]
    labels: list[int]
    row: str

    @property
    def targets(self) -> int:
        return sum(label != -100 for label in self.labels)


def item(number: int, length: int, trained: int) -> Item:
    """Ids that are unlike any other example's, the last `trained` of them with labels."""
    ids = [1 + number * 1000 + place for place in range(length)]
    first = max(1, length - trained)
    return Item(ids, [-100] * first + ids[first:], f"file.jsonl:{number}")


items = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 40)), min_size=1, max_size=25).map(
    lambda sizes: [item(number, *size) for number, size in enumerate(sizes)]
)


def tokens_of(batches):
    """Every (token number, id, label) of the members, from their spans, without looking at padding."""
    found = []
    for batch in batches:
        for row, start, stop in batch.spans:
            part = slice(start, stop)
            columns = (batch.token[row, part], batch.ids[row, part], batch.labels[row, part])
            found += list(zip(*(column.tolist() for column in columns)))
    return sorted(found)


@settings(deadline=None, max_examples=60)
@given(items, st.integers(1, 400), st.booleans())
def test_every_token_comes_out_once_whatever_the_batches(examples, micro_tokens, packing):
    batches = pack(examples, micro_tokens=micro_tokens, packing=packing, pad_id=PAD)
    expected = sorted(
        (number * TOKENS + place, token, label)
        for number, example in enumerate(examples)
        for place, (token, label) in enumerate(zip(example.ids, example.labels))
    )
    assert tokens_of(batches) == expected
    assert sorted(row for batch in batches for row in batch.rows) == sorted(e.row for e in examples)
    assert sum(batch.targets for batch in batches) == sum(example.targets for example in examples)


@settings(deadline=None, max_examples=60)
@given(items, st.integers(1, 400), st.booleans())
def test_budget_padding_and_positions(examples, micro_tokens, packing):
    for batch in pack(examples, micro_tokens=micro_tokens, packing=packing, pad_id=PAD):
        assert batch.ids.numel() <= micro_tokens or len(batch.rows) == 1
        assert batch.ids.dtype == batch.labels.dtype == batch.token.dtype == torch.int64
        assert batch.targets == int((batch.labels != -100).sum())
        assert len(batch.rows) == len(batch.spans)
        assert {row for row, _, _ in batch.spans} == set(range(len(batch.ids))), "a row of padding only"
        inside = torch.zeros_like(batch.ids)
        for row, start, stop in batch.spans:
            inside[row, start:stop] += 1
        assert inside.max() == 1, "members overlap"
        padding = inside == 0
        assert (batch.ids[padding] == PAD).all()
        assert (batch.labels[padding] == -100).all()
        if not packing:
            assert batch.position is None
            continue
        for row in range(len(batch.ids)):
            starts = [start for at, start, _ in batch.spans if at == row]
            end = max(stop for at, _, stop in batch.spans if at == row)
            starts += [end] if end < batch.ids.shape[1] else []
            restarts = (batch.position[row] == 0).nonzero().flatten().tolist()
            assert restarts == sorted(starts)
            assert (batch.labels[row, restarts] == -100).all(), "a document's first token is predicted"
            steps = batch.position[row].diff()
            assert ((steps == 1) | (batch.position[row, 1:] == 0)).all()


def test_packing_fills_rows_best_first():
    lengths = [100, 60, 156, 30, 120, 40]
    [batch] = pack(
        [item(n, size, 5) for n, size in enumerate(lengths)],
        micro_tokens=512,
        packing=True,
        pad_id=PAD,
        row_length=256,
    )
    assert batch.ids.shape == (2, 256)
    # longest first, each into the fullest row that holds it: 156 + 100, then 120 + 60 + 40 + 30
    members = list(zip(batch.rows, batch.spans))
    assert members == [
        ("file.jsonl:2", (0, 0, 156)),
        ("file.jsonl:0", (0, 156, 256)),
        ("file.jsonl:4", (1, 0, 120)),
        ("file.jsonl:1", (1, 120, 180)),
        ("file.jsonl:5", (1, 180, 220)),
        ("file.jsonl:3", (1, 220, 250)),
    ]


def test_rows_come_out_even_and_are_cut_to_what_they_hold():
    examples = [item(number, 11, 3) for number in range(32)]  # 352 tokens: one row of 256 would leave 96
    [batch] = pack(examples, micro_tokens=2048, packing=True, pad_id=PAD)
    assert batch.ids.shape == (2, 176)
    assert sum(stop - start for _, start, stop in batch.spans) == 352


def test_a_short_budget_makes_more_batches_of_the_same_row_length():
    examples = [item(number, 200, 9) for number in range(5)]
    batches = pack(examples, micro_tokens=512, packing=True, pad_id=PAD)
    assert [tuple(batch.ids.shape) for batch in batches] == [(2, 208), (2, 208), (1, 208)], "cut to 16"
    assert len(pack(examples, micro_tokens=512, packing=True, pad_id=PAD, row_length=512)) == 3


def test_an_example_over_the_budget_stands_alone():
    examples = [item(0, 50, 9), item(1, 333, 9), item(2, 20, 9)]
    for packing in (True, False):
        batches = pack(examples, micro_tokens=100, packing=packing, pad_id=PAD)
        [long] = [batch for batch in batches if "file.jsonl:1" in batch.rows]
        assert long.rows == ["file.jsonl:1"]
        assert long.ids.shape == (1, 333)
        assert all(batch.ids.numel() <= 100 for batch in batches if batch is not long)


def test_without_packing_similar_lengths_share_a_batch():
    examples = [item(0, 10, 2), item(1, 40, 2), item(2, 12, 2), item(3, 38, 2)]
    batches = pack(examples, micro_tokens=80, packing=False, pad_id=PAD)
    assert [batch.rows for batch in batches] == [
        ["file.jsonl:0", "file.jsonl:2"],
        ["file.jsonl:3", "file.jsonl:1"],
    ]
    assert batches[0].ids[0].tolist() == [*examples[0].ids, PAD, PAD]


def test_what_cannot_be_packed():
    assert pack([], micro_tokens=10, packing=True, pad_id=PAD) == []
    with pytest.raises(ValueError, match="micro_tokens is 0"):
        pack([item(0, 5, 2)], micro_tokens=0, packing=True, pad_id=PAD)
    with pytest.raises(ValueError, match="its first token has a label"):
        pack([Item([1, 2], [1, 2], "a:1")], micro_tokens=10, packing=True, pad_id=PAD)
    with pytest.raises(ValueError, match="row_length is 4"):
        pack([item(0, 5, 2)], micro_tokens=10, packing=True, pad_id=PAD, row_length=4)


def test_to_moves_every_tensor():
    [batch] = pack([item(0, 5, 2)], micro_tokens=64, packing=True, pad_id=PAD)
    moved = batch.to("meta")
    assert {moved.ids.device.type, moved.labels.device.type, moved.token.device.type} == {"meta"}
    assert moved.position is not None
    assert moved.position.device.type == "meta"
    assert (moved.targets, moved.rows, moved.spans) == (batch.targets, batch.rows, batch.spans)
    [plain] = pack([item(0, 5, 2)], micro_tokens=64, packing=False, pad_id=PAD)
    assert plain.to("meta").position is None


sizes = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(1, 9), st.integers(0, 5), st.integers(1, 3))
def test_each_epoch_visits_each_example_once(lengths, batch_size, seed, epochs):
    plan = StepPlan(lengths, epochs=epochs, batch_size=batch_size, seed=seed)
    per_epoch = -(-len(lengths) // batch_size)
    assert len(plan) == epochs * per_epoch
    for epoch in range(epochs):
        steps = [plan[step] for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        assert sorted(index for step in steps for index in step) == list(range(len(lengths)))
        assert [len(step) for step in steps[:-1]] == [batch_size] * (per_epoch - 1)


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(1, 120), st.integers(0, 5))
def test_batch_tokens_is_a_budget(lengths, batch_tokens, seed):
    plan = StepPlan(lengths, epochs=2, batch_tokens=batch_tokens, seed=seed)
    steps = list(plan)
    assert sorted(index for step in steps for index in step) == sorted([*range(len(lengths))] * 2)
    for step in steps:
        assert sum(lengths[index] for index in step) <= batch_tokens or len(step) == 1
    second = plan.start_of(1)
    for at, (step, later) in enumerate(pairwise(steps)):
        if at + 1 != second:  # no step could have taken the next one's first example
            assert sum(lengths[index] for index in (*step, later[0])) > batch_tokens


@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(1, 120), st.data())
def test_the_plan_is_a_function_of_the_step(lengths, batch_tokens, data):
    plan = StepPlan(lengths, epochs=3, batch_tokens=batch_tokens, seed=3)
    steps = list(plan)
    at = data.draw(st.integers(0, len(plan) - 1))
    fresh = StepPlan(lengths, epochs=3, max_steps=10**9, batch_tokens=batch_tokens, seed=3)
    assert fresh[at] == steps[at]
    assert fresh.start_of(fresh.epoch_of(at)) <= at < fresh.start_of(fresh.epoch_of(at) + 1)
    other = data.draw(st.integers(0, len(plan) - 1))
    assert plan[other] == steps[other]


def test_epochs_may_be_a_part_and_max_steps_wraps():
    lengths = [1] * 40
    assert len(StepPlan(lengths, epochs=1.5, batch_size=16)) == 5  # 3 a whole epoch, then 2 of 3
    assert len(StepPlan(lengths, epochs=0.01, batch_size=16)) == 1
    assert len(StepPlan(lengths, epochs=0.5, batch_tokens=10)) == 2
    assert len(StepPlan(lengths, epochs=1)) == 3  # 16 examples a step by default
    plan = StepPlan(lengths, epochs=1, max_steps=7, batch_size=16)
    assert len(plan) == 7
    assert [plan.epoch_of(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    first, second = ([index for step in part for index in step] for part in (list(plan)[:3], list(plan)[3:6]))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second, "every epoch has an order of its own"
    with pytest.raises(IndexError):
        plan[7]


def test_seeds_change_the_order_and_nothing_else():
    one, same, other = (StepPlan([1] * 50, seed=seed) for seed in (1, 1, 2))
    assert list(one) == list(same)
    assert list(one) != list(other)


def test_a_plan_needs_examples_and_one_size():
    with pytest.raises(ValueError, match="no examples"):
        StepPlan([])
    with pytest.raises(ValueError, match="two ways"):
        StepPlan([1], epochs=1, max_steps=None, batch_size=1, batch_tokens=1, seed=0)


def test_a_large_plan_is_cheap():
    plan = StepPlan(torch.randint(1, 500, (100_000,)), epochs=2, batch_tokens=8192)
    assert sorted(i for step in range(plan.start_of(1)) for i in plan[step]) == list(range(100_000))
