"""The training step: it does not depend on how it is split, moves nothing when it fails, and learns.

The truth of a split is the same step taken in one piece, in float64; of the optimizers, torch.optim by itself.
"""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import digest, stir
from tiny_models import causal
from tiny_run import adapter_bytes, make_data, make_model, make_shop, run_tiny, settings
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from loraloom import api, methods
from loraloom.adapt import Adapters
from loraloom.adapter import AdapterSpec
from loraloom.adapter_io import load_adapter
from loraloom.checkpoint import Progress
from loraloom.config import TrainConfig
from loraloom.data import Example, Examples
from loraloom.errors import DataError, Failure, NonFinite, UserError
from loraloom.incoming import quantize_model
from loraloom.methods.lora import LoRA
from loraloom.model import load_model
from loraloom.optim import make_optimizer, rate_factor, set_rates, warmup_steps
from loraloom.packing import Batch, pack
from loraloom.recompute import apply
from loraloom.rundir import Run
from loraloom.step import Queued, StepStats, check_gradients, guards, queue_step, train_step
from loraloom.train import Steps
from loraloom.workshop import build

pytestmark = pytest.mark.usefixtures("quick")
EXACT = {"rtol": 1e-10, "atol": 1e-14}  # float64 sums in another order
SGD = TrainConfig(optimizer="sgd", momentum=0.0, weight_decay=0.0)


def examples(count: int = 8, *, seed: int = 3) -> list[Example]:
    """Documents of mixed lengths; some carry loss on all tokens, some on the last few, one on none."""
    gen = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = int(torch.randint(4, 30, (), generator=gen))
        ids = torch.randint(0, 256, (length,), generator=gen).tolist()
        masked = [1, length // 2, length - 1, length][i % 4]
        made.append(Example(ids, [-100] * masked + ids[masked:], f"rows:{i}"))
    return made


def double(
    kind: str = "gpt2",
    *,
    method: str = "lora",
    dropout: float = 0.0,
    quantize: str | None = None,
    **more: Any,
) -> tuple[Any, Adapters]:
    """A model and an adapter that has left its start, both in float64."""
    model = causal(kind, scale=2.0).double()
    if quantize is not None:
        quantize_model(model, quantize)
    adapters = Adapters(model)
    adapters.add("a", AdapterSpec(method=method, r=3, dropout=dropout, **more))
    for parameter in adapters.parameters():
        parameter.data = parameter.data.double()
    stir(adapters)
    adapters.train()
    return model, adapters


def take(model: Any, adapters: Adapters, batches: list[Batch], *, step: int = 4, **more: Any) -> StepStats:
    optimizer = make_optimizer(adapters.groups(0.1), more.pop("config", SGD))
    return train_step(
        model, adapters, optimizer, batches, step=step, num_steps=10, **{"max_norm": None} | more
    )


def moved(adapters: Adapters) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapters.named_parameters()}


SPLITS = {
    "one batch of 8": {"micro_tokens": 8 * 64, "packing": False},
    "two rows each": {"micro_tokens": 64, "packing": False},
    "one by one": {"micro_tokens": 1, "packing": False},
    "packed": {"micro_tokens": 1024, "packing": True},
    "packed tightly": {"micro_tokens": 64, "packing": True},
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("quantize", [None, "nf4", "fp4"])
def test_a_step_does_not_depend_on_how_it_is_split(method: str, dropout: float, quantize: str | None) -> None:
    results = {}
    for name, split in SPLITS.items():
        model, adapters = double(method=method, dropout=dropout, quantize=quantize)
        batches = pack(examples(), pad_id=256, **split)
        stats = take(model, adapters, batches)
        results[name] = (len(batches), stats, moved(adapters))
    counts = {count for count, _, _ in results.values()}
    assert {1, 8} <= counts  # the splits are different ones
    assert len(counts) >= 4
    _, stats, first = results["one batch of 8"]
    start = moved(double(method=method)[1])
    assert all(not torch.equal(first[name], start[name]) for name in first)
    for name, (_, other, values) in results.items():
        assert other.targets == stats.targets, name
        assert other.tokens == stats.tokens == sum(len(example.ids) for example in examples())
        assert other.loss == pytest.approx(stats.loss, rel=1e-10)
        assert other.grad_norm == pytest.approx(stats.grad_norm, rel=1e-10)
        for key in first:
            torch.testing.assert_close(values[key], first[key], **EXACT)


def test_dropout_is_there_and_changes_from_step_to_step() -> None:
    losses = []
    for dropout, step in ((0.0, 4), (0.3, 4), (0.3, 5), (0.3, 4)):
        model, adapters = double(dropout=dropout)
        losses.append(take(model, adapters, pack(examples(), pad_id=256, **SPLITS["packed"]), step=step).loss)
    assert len(set(losses)) == 3
    assert losses[1] == losses[3]


@pytest.mark.parametrize(("kind", "rel"), [("gpt2", 1e-10), ("llama", 2e-5)])  # Llama's norms are float32
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_gradient_checkpointing_computes_the_same(kind: str, rel: float, quantize: str | None) -> None:
    runs = []
    for checkpointed in (False, True):
        model, adapters = double(kind, dropout=0.2, quantize=quantize)
        calls: list[Any] = []
        layer = model.get_submodule("transformer.h.0.mlp" if kind == "gpt2" else "model.layers.0.mlp")
        layer.register_forward_pre_hook(lambda *inputs, calls=calls: calls.append(inputs))
        if checkpointed:
            apply(model, adapters, "full")
        batches = pack(examples(), pad_id=256, micro_tokens=64, packing=True)
        stats = take(model, adapters, batches)
        assert len(calls) == len(batches) * (1 + checkpointed)  # recomputed, not only said to be
        runs.append((stats, moved(adapters)))
    (one, first), (two, second) = runs
    assert two.loss == pytest.approx(one.loss, rel=rel)
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=rel, atol=rel / 100)


def test_the_gradient_is_that_of_the_mean_over_targets_taken_by_hand() -> None:
    model, adapters = double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example in examples():
        logits = model(torch.tensor([example.ids])).logits[0, :-1]
        total = total + nn.functional.cross_entropy(logits, torch.tensor(example.labels[1:]), reduction="sum")
        count += sum(label != -100 for label in example.labels)
    parameters = adapters.parameters()
    expected = torch.autograd.grad(total / count, parameters)
    start = moved(adapters)
    stats = take(model, adapters, pack(examples(), pad_id=256, micro_tokens=100, packing=True))
    assert stats.loss == pytest.approx(total.item() / count, rel=1e-10)
    assert stats.grad_norm == pytest.approx(
        math.sqrt(sum(float(g.square().sum()) for g in expected)), rel=1e-10
    )
    for (name, parameter), gradient in zip(adapters.named_parameters(), expected):
        torch.testing.assert_close(parameter.detach(), start[name] - 0.1 * gradient, **EXACT)


def test_clipping_scales_the_whole_gradient() -> None:
    results = {}
    for limit in (None, 0.01, 1e9):
        model, adapters = double()
        start = moved(adapters)
        stats = take(model, adapters, pack(examples(), pad_id=256, **SPLITS["packed"]), max_norm=limit)
        change = {name: value - start[name] for name, value in moved(adapters).items()}
        results[limit] = (stats.grad_norm, change)
    norm, free = results[None]
    assert norm > 0.01  # else nothing would be clipped
    assert results[0.01][0] == pytest.approx(norm)  # what is reported is the norm before clipping
    for name in free:
        torch.testing.assert_close(results[0.01][1][name], free[name] * 0.01 / norm, rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(results[1e9][1][name], free[name], **EXACT)


def test_a_step_without_a_trained_token_is_an_error() -> None:
    model, adapters = double()
    start = moved(adapters)
    masked = [replace(example, labels=[-100] * len(example.ids)) for example in examples(2)]
    with pytest.raises(ValueError, match="step 4: no token carries loss"):
        take(model, adapters, pack(masked, pad_id=256, **SPLITS["packed"]))
    assert all(torch.equal(value, start[name]) for name, value in moved(adapters).items())


# ---- broken numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_that_is_not_finite_names_the_very_rows(packing: bool) -> None:
    model, adapters = double()
    rows = examples()
    rows[5] = replace(rows[5], ids=[255, *rows[5].ids[1:]])
    for i, example in enumerate(rows):
        rows[i] = replace(example, ids=[254 if t == 255 and i != 5 else t for t in example.ids])
    model.get_input_embeddings().weight.data = model.get_input_embeddings().weight.data.clone()  # untied here
    model.get_input_embeddings().weight.data[255] = math.nan
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().nan_to_num(0.0), requires_grad=False)
    start = moved(adapters)
    batches = pack(rows, pad_id=256, micro_tokens=64, packing=packing)
    with pytest.raises(NonFinite) as caught:
        take(model, adapters, batches, config=TrainConfig())
    assert caught.value.details == ["rows:5: its loss is not finite"]
    assert caught.value.message.startswith("step 5: loss nan")
    assert caught.value.hint is not None
    assert all(torch.equal(value, start[name]) for name, value in moved(adapters).items())
    assert all(parameter.grad is None for parameter in adapters.parameters())


def test_a_gradient_that_is_not_finite_moves_nothing_and_says_so() -> None:
    model, adapters = double()
    start = moved(adapters)
    site = next(iter(adapters.adapters["a"].sites.values()))
    site.p["A"].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFinite, match=r"gradient norm (inf|nan)") as caught:
        take(model, adapters, pack(examples(3), pad_id=256, **SPLITS["packed"]), config=TrainConfig())
    (line,) = caught.value.details
    assert "every row's loss is finite" in line
    assert all(f"rows:{i}" in line for i in range(3))
    assert all(torch.equal(value, start[name]) for name, value in moved(adapters).items())


def test_an_optimizer_that_is_told_on_the_device_moves_as_one_that_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fused AdamW steps before the host has seen the numbers: a broken step between two good ones leaves no trace."""
    batches = pack(examples(3), pad_id=256, **SPLITS["packed"])
    found = []
    for fused in (False, True):
        model, adapters = double()
        optimizer = torch.optim.AdamW(adapters.groups(0.1), lr=0.1, fused=fused)
        assert guards(optimizer, adapters) == fused
        own, factors = optimizer.step, iter([1.0, math.inf, 1.0])
        site = next(iter(adapters.adapters["a"].sites.values()))
        site.p["A"].register_hook(lambda gradient, factors=factors: gradient * next(factors))
        taken: list[int] = []
        monkeypatch.setattr(optimizer, "step", lambda own=own, taken=taken: (taken.append(1), own()))
        for good in (True, False, True):
            before = moved(adapters)
            with nullcontext() if good else pytest.raises(NonFinite, match="gradient norm"):
                train_step(model, adapters, optimizer, batches, step=4, num_steps=10, max_norm=1.0)
            same = [torch.equal(value, before[name]) for name, value in moved(adapters).items()]
            assert not any(same) if good else all(same)
        assert len(taken) == 2 + fused
        found.append(moved(adapters))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, **EXACT)


def fused(adapters: Adapters) -> torch.optim.Optimizer:
    """The optimizer of a run on a GPU."""
    optimizer = make_optimizer(adapters.groups(0.1), TrainConfig())
    for group in optimizer.param_groups:
        group.update(fused=True, foreach=False)
    return optimizer


def test_a_step_queued_behind_a_broken_one_moves_nothing() -> None:
    """The next step may be queued before the host knows that this one is not finite."""
    batches = pack(examples(3), pad_id=256, **SPLITS["packed"])
    model, adapters = double()
    optimizer = fused(adapters)
    site, factors = next(iter(adapters.adapters["a"].sites.values())), iter([1.0, math.inf, 1.0])
    site.p["A"].register_hook(lambda gradient: gradient * next(factors))

    def queue(step: int, after: Queued | None) -> Queued:
        return queue_step(
            model, adapters, optimizer, batches, step=step, num_steps=9, max_norm=1.0, after=after
        )

    first = queue(0, None)
    kept = moved(adapters)
    broken = queue(1, first)
    behind = queue(2, broken)
    assert first.moved
    assert behind.moved
    assert math.isfinite(first.settle().loss)
    with pytest.raises(NonFinite, match="step 2:"):
        broken.settle()
    assert all(torch.equal(value, kept[name]) for name, value in moved(adapters).items())


@pytest.mark.parametrize(
    "alone", [set(), {2}, {0, 1, 2, 3, 4}], ids=["ahead", "one is looked at", "one by one"]
)
def test_steps_queued_ahead_are_steps_one_by_one(alone: set[int]) -> None:
    batches = [pack(examples(3 + n % 2), pad_id=256, **SPLITS["packed"]) for n in range(5)]
    model, adapters = double()
    optimizer = fused(adapters)
    train = SimpleNamespace(schedule="cosine", max_grad_norm=1.0)
    shop: Any = SimpleNamespace(
        config=SimpleNamespace(train=train),
        model=model,
        adapters=adapters,
        optimizer=optimizer,
        plan=range(5),
        graphs=None,
    )
    steps, found = Steps(shop, iter(batches), num_warmup=1), []
    for step in range(5):
        stats, lr = steps.take(step, alone=step in alone or step == 4)
        assert (steps.next is None) == (step in alone or step in (0, 4)) or step == 0
        found.append((stats.loss, stats.grad_norm, lr))
    other, others = double()
    optimizer = fused(others)
    for step, (batch, seen) in enumerate(zip(batches, found)):
        lr = set_rates(optimizer, rate_factor("cosine", step, 5, 1))
        stats = train_step(other, others, optimizer, batch, step=step, num_steps=5, max_norm=1.0)
        assert (stats.loss, stats.grad_norm, lr) == seen
    for name, value in moved(others).items():
        assert torch.equal(moved(adapters)[name], value)


def test_a_step_that_cannot_be_queued_fails_after_the_one_before_it_is_told() -> None:
    model, adapters = double()
    optimizer = fused(adapters)
    train = SimpleNamespace(schedule="constant", max_grad_norm=None)
    shop: Any = SimpleNamespace(
        config=SimpleNamespace(train=train),
        model=model,
        adapters=adapters,
        optimizer=optimizer,
        plan=range(9),
        graphs=None,
    )
    good = pack(examples(3), pad_id=256, **SPLITS["packed"])
    steps = Steps(shop, iter([good, good]), num_warmup=0)
    steps.take(0, alone=False)
    assert math.isfinite(steps.take(1, alone=False)[0].loss)  # there is no third
    with pytest.raises(StopIteration):
        steps.take(2, alone=False)


class Spare(nn.Module):
    """A Linear that the forward pass uses, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(258, 8)
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 258)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.used(self.embed(input_ids)))


def test_a_layer_that_the_model_does_not_use_is_named_after_the_first_backward() -> None:
    torch.manual_seed(0)
    model = Spare()
    adapters = Adapters(model)
    adapters.add("a", AdapterSpec(r=2, target_modules=["used", "unused"]))
    start = moved(adapters)
    batches = pack(examples(), pad_id=256, micro_tokens=64, packing=False)
    with pytest.raises(Failure, match="1 adapted layers received no gradient") as caught:
        take(model, adapters, batches, inspect=lambda: check_gradients(adapters))
    assert caught.value.details == ["unused"]
    assert all(torch.equal(value, start[name]) for name, value in moved(adapters).items())


# ---- hooks of methods ---------------------------------------------------------------------------------------


def test_hooks_run_in_order_with_gradients_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Spy(LoRA):
        def penalty(self, sites: Any) -> torch.Tensor:
            seen.append(("penalty", sites[0].p["B"].grad.clone()))
            return sum((site.p["B"].square().sum() for site in sites), torch.zeros((), dtype=torch.float64))

        def before_step(self, sites: Any, step: int) -> None:
            seen.append(("before", step, sites[0].p["B"].grad.clone(), sites[0].p["B"].detach().clone()))

        def after_step(self, sites: Any, step: int, num_steps: int) -> None:
            seen.append(
                ("after", step, num_steps, sites[0].p["B"].grad.clone(), sites[0].p["B"].detach().clone())
            )

    find = methods.find
    monkeypatch.setattr(methods, "find", lambda name: Spy if name == "spy" else find(name))
    model, adapters = double(method="spy")
    site = next(iter(adapters.adapters["a"].sites.values()))
    start = site.p["B"].detach().clone()
    norms = []
    batches = pack(examples(), pad_id=256, **SPLITS["two rows each"])
    take(model, adapters, batches, max_norm=0.5, inspect=lambda: norms.append(site.p["B"].grad.clone()))
    assert [entry[0] for entry in seen] == ["penalty", "before", "after"]  # once a step, not once a batch
    penalty, before, after = seen
    assert before[1] == after[1] == 4
    assert after[2] == 10
    unclipped = penalty[1] + 2 * start
    ratio = float((before[2] / unclipped).median())
    assert ratio < 1  # clipped, after the penalty's gradient came to the loss's
    torch.testing.assert_close(before[2], unclipped * ratio)
    assert torch.equal(norms[0], before[2])
    assert torch.equal(before[3], start)
    assert not torch.equal(after[4], start)
    assert torch.equal(after[3], before[2])  # still there
    assert site.p["B"].grad is None


@pytest.mark.parametrize("method", ["adalora", "deltalora", "dora", "pissa", "vera", "adapterh"])
def test_unlike_methods_take_a_step_that_does_not_depend_on_its_split(
    method: str,
) -> None:
    results = []
    for split in ("packed", "two rows each"):
        model = causal("gpt2", scale=2.0)
        adapters = Adapters(model)
        adapters.add("a", AdapterSpec(method=method, r=3))
        model.double()
        for site in adapters.adapters["a"].sites.values():
            for tensor in site.p.values():
                tensor.data = tensor.data.double()
        stir(adapters)
        adapters.train()
        results.append(take(model, adapters, pack(examples(), pad_id=256, **SPLITS[split])))
        results[-1] = (results[-1], moved(adapters))
    (one, first), (two, second) = results
    assert two.loss == pytest.approx(one.loss, rel=1e-10)
    for key in first:
        torch.testing.assert_close(second[key], first[key], **EXACT)


# ---- optimizers and schedules -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_trajectories_are_those_of_torch_optim(name: str, schedule: str) -> None:
    torch.manual_seed(1)
    shapes = [(4, 3), (5,), (2, 4), (3,)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    config = TrainConfig(optimizer=name, weight_decay=0.1, betas=(0.8, 0.95), momentum=0.7)
    optimizer = make_optimizer([{"params": ours[:2], "lr": 0.01}, {"params": ours[2:], "lr": 0.16}], config)
    decay = [0.1, 0.0, 0.1, 0.0]  # matrices only
    groups = [
        {"params": [p], "lr": 0.01 * 16 ** (i // 2), "weight_decay": decay[i]} for i, p in enumerate(theirs)
    ]
    reference: Any = (
        torch.optim.SGD(groups, momentum=0.7)
        if name == "sgd"
        else torch.optim.AdamW(groups, betas=(0.8, 0.95))
    )
    rates = [group["lr"] for group in reference.param_groups]
    for step in range(9):
        gradients = [torch.randn(shape) for shape in shapes]
        for mine, other, gradient in zip(ours, theirs, gradients):
            mine.grad, other.grad = gradient.clone(), gradient.clone()
        factor = rate_factor(schedule, step, 9, 3)
        assert set_rates(optimizer, factor) == 0.01 * factor
        for group, rate in zip(reference.param_groups, rates):
            group["lr"] = rate * factor
        optimizer.step()
        reference.step()
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs)), step


def test_decay_is_on_matrices_and_lora_plus_keeps_its_ratio_through_the_schedule() -> None:
    model = causal("gpt2")
    adapters = Adapters(model)
    adapters.add("a", AdapterSpec(method="loraplus", r=3, options={"lr_ratio": 8}, bias="lora_only"))
    optimizer = make_optimizer(adapters.groups(1e-3), TrainConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in adapters.named_parameters()}
    for step in (0, 3, 7):
        factor = rate_factor("cosine", step, 10, 2)
        assert set_rates(optimizer, factor) == 1e-3 * factor
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                is_b = names[id(parameter)].endswith("/B")
                assert group["lr"] == pytest.approx(1e-3 * factor * (8 if is_b else 1), rel=1e-12)
                assert group["weight_decay"] == (0.3 if parameter.dim() >= 2 else 0.0)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(names)


def test_schedules_are_those_of_transformers() -> None:
    """Theirs begins its warm-up at zero, ours one step further on: step s of ours is s + 1 of theirs."""
    num_steps, num_warmup = 20, 4

    def factors(make: Any, warmup: int, steps: int) -> list[float]:
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        schedule = make(optimizer, warmup, steps)
        values = []
        for _ in range(steps + 1):
            values.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return values

    for name, make in (
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
    ):
        theirs = factors(make, num_warmup, num_steps)
        ours = [rate_factor(name, step, num_steps, num_warmup) for step in range(num_steps)]
        assert ours[:num_warmup] == pytest.approx(theirs[1 : num_warmup + 1])
        assert ours[num_warmup:] == pytest.approx(theirs[num_warmup:num_steps])
        assert min(ours) > 0  # no step is wasted
    assert [rate_factor("constant", step, 20, 2) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="no schedule 'cosin'"):
        rate_factor("cosin", 5, 20, 4)


def test_warmup_as_a_share_or_a_number() -> None:
    assert [warmup_steps(value, 100) for value in (0, 0.03, 0.025, 1, 7)] == [0, 3, 3, 1, 7]


# ---- whole runs ---------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_the_base_alone(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    before: dict[str, bytes] = {}
    shops: list[Any] = []

    def listen(kind: str, record: Any) -> None:
        if kind == "workshop":
            shops.append(record)
            before.update(digest(record.model))

    run = run_tiny(model_folder, data_file, tmp_path / "run", listen=listen, train__max_steps=30, dropout=0.1)
    assert digest(shops[0].model) == before
    assert all(parameter.requires_grad is False for parameter in shops[0].model.parameters())
    losses = [record["loss"] for record in run.metrics("train")]
    assert [record["step"] for record in run.metrics("train")] == list(range(1, 31))
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    held = {record["step"]: record["loss"] for record in run.metrics("eval")}
    assert list(held) == list(range(0, 31, 2))
    assert run.state["status"] == "done"
    assert run.state["base_loss"] == held[0]
    assert run.state["best"]["loss"] == min(held.values()) == held[run.state["best"]["step"]]
    assert run.state["best"]["loss"] < 0.75 * held[0]
    assert {check["name"] for check in run.checks()} >= {
        "learnt",
        "finite",
        "gradients",
        "adapter reads back",
    }
    assert all(check["ok"] for check in run.checks() if check["name"] in ("learnt", "adapter reads back"))
    assert (run.path / "README.md").is_file()
    assert not list(run.path.rglob(".*"))  # nothing half written stays


def test_the_first_evaluation_is_the_untouched_base(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    from loraloom.heldout import held_out
    from loraloom.model import pad_id

    run = run_tiny(model_folder, data_file, tmp_path / "run", train__max_steps=1)
    shop = make_shop(model_folder, data_file)
    loaded = load_model(shop.config.model, offline=True)
    loss = held_out(loaded.model, shop.eval, pad_id=pad_id(loaded.tokenizer), micro_tokens=1, packing=False)
    assert run.state["base_loss"] == pytest.approx(loss.mean, rel=1e-5)


def poisoned(folder: Path, word: str = "%") -> Path:
    """A model whose embedding of one token is NaN; the head is its own, so other rows stay finite."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    make_model(folder, tied=False)
    tensors = load_file(folder / "model.safetensors")
    (token,) = AutoTokenizer.from_pretrained(folder)(word)["input_ids"]
    tensors["model.embed_tokens.weight"][token] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("held", [0, 4])
def test_a_run_that_breaks_names_the_row_and_keeps_what_it_had(tmp_path: Path, held: int) -> None:
    from loraloom import cli

    model = poisoned(tmp_path / "model")
    data = make_data(tmp_path / "sums.jsonl", rows=21)
    lines = data.read_text().splitlines()
    clean = make_shop(model, data, data__eval=held)
    last = clean.train[clean.plan[3][0]].row  # trained on in the fourth step, and not before
    number = int(last.rpartition(":")[2])
    row = json.loads(lines[number - 1])
    lines[number - 1] = json.dumps(row | {"prompt": row["prompt"].replace("and", "% d", 1)})
    data.write_text("\n".join(lines) + "\n")
    flags = [f"--set={k}={v}" for k, v in settings(model, data, tmp_path / "run", data__eval=held).items()]
    code = cli.run(["train", *flags, "--set=train.save_every=1", "--offline"])
    assert code == 5
    run = api.Run.open(tmp_path / "run")
    assert run.state["status"] == "failed"
    assert run.state["step"] == 3
    assert "step 4" in run.state["message"]
    assert [step for step, _ in run.checkpoints()] == [2, 3]
    loaded = load_model(run.config.model, offline=True)
    adapters = load_adapter(loaded.model, run.adapter_path)
    assert all(bool(parameter.isfinite().all()) for parameter in adapters.parameters())


def test_the_message_of_a_broken_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from loraloom import cli

    model = poisoned(tmp_path / "model")
    data = make_data(tmp_path / "sums.jsonl", rows=6)
    lines = data.read_text().splitlines()
    lines[2] = json.dumps({"prompt": "what % is", "completion": "the answer is four"})
    data.write_text("\n".join(lines) + "\n")
    flags = [f"--set={k}={v}" for k, v in settings(model, data, tmp_path / "run", data__eval=0).items()]
    assert cli.run(["train", *flags, "--set=train.batch_size=6", "--offline"]) == 5
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "sums.jsonl:3: its loss is not finite" in shown.err
    assert shown.err.count("its loss is not finite") == 1
    assert "step-000000" in shown.err  # where the state is kept
    assert "Traceback" not in shown.err


def test_packed_or_not_a_run_ends_the_same(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """float32, so sums in another order differ; ten steps do not let that grow."""
    finals = []
    for name, changes in (
        ("packed", {}),
        ("padded", {"data__packing": False}),
        ("small", {"train__micro_tokens": 16}),
        ("checkpointed", {"train__recompute": "full"}),
    ):
        run = run_tiny(model_folder, data_file, tmp_path / name, dropout=0.1, **changes)
        finals.append([record["loss"] for record in run.metrics("eval")])
        assert run.state["status"] == "done"
    for other in finals[1:]:
        assert other == pytest.approx(finals[0], rel=1e-3)


def test_the_same_seed_gives_the_same_bytes(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    first, second, other = (
        run_tiny(model_folder, data_file, tmp_path / name, train__seed=seed, dropout=0.1, train__max_steps=4)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert adapter_bytes(first) == adapter_bytes(second)
    assert adapter_bytes(first) != adapter_bytes(other)


def test_examples_are_what_the_workshop_trains_on(model_folder: Path, data_file: Path) -> None:
    shop = make_shop(model_folder, data_file)
    assert isinstance(shop.train, Examples)
    assert len(shop.train) == 20
    assert len(shop.eval) == 4
    assert shop.decided.keys() == {"alpha", "target_modules", "train.micro_tokens", "train.recompute"}
    assert (shop.config.alpha, shop.config.target_modules) == ("2r", "all-linear")


def test_weights_that_diverged_are_never_kept_as_good(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """Without a held-out set nothing but the next step can tell: its checkpoint is set aside, and its adapter goes."""
    wild = {"train__optimizer": "sgd", "train__learning_rate": 1e30, "train__max_grad_norm": None}
    wild |= {"train__schedule": "constant", "train__warmup": 0, "train__save_every": 1, "data__eval": 0}
    with pytest.raises(NonFinite, match="step 2") as caught:
        run_tiny(model_folder, data_file, tmp_path / "run", **wild)
    assert not caught.value.weights_good
    assert "diverged" in caught.value.details[0]
    run = Run.open(tmp_path / "run")
    assert run.state["status"] == "failed"
    assert run.checkpoints() == []
    assert not run.adapter_path.exists()
    assert (run.path / "diverged" / "state.safetensors").is_file()


def test_the_last_good_adapter_comes_back(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    steady = {"train__max_steps": 3, "train__save_every": 1, "data__eval": 0}
    run = run_tiny(model_folder, data_file, tmp_path / "run", **steady)
    kept = (run.checkpoints()[-2][1] / "adapter_model.safetensors").read_bytes()
    assert (run.adapter_path / "adapter_model.safetensors").read_bytes() != kept
    shop = build(run.config, offline=True, progress=False)
    said = api.last_good(shop, run, Progress(step=3))
    assert "the state of step 2" in said
    assert (run.adapter_path / "adapter_model.safetensors").read_bytes() == kept


def test_a_held_out_loss_that_breaks_leaves_the_best_adapter(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    wild = {"train__optimizer": "sgd", "train__learning_rate": 1e30, "train__max_grad_norm": None}
    wild |= {"train__schedule": "constant", "train__warmup": 0, "train__save_every": 1, "eval__every": 1}
    with pytest.raises(NonFinite):
        run_tiny(model_folder, data_file, tmp_path / "run", **wild)
    run = Run.open(tmp_path / "run")
    assert run.state["best"]["step"] == 0
    assert run.checkpoints() == []
    tensors = load_file(run.adapter_path / "adapter_model.safetensors")
    assert all(float(tensor.abs().max()) < 10 for tensor in tensors.values())


def test_a_wrong_path_or_method_is_said_before_the_model_is_loaded(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraloom.workshop.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        run_tiny(model_folder, tmp_path / "missing.jsonl", tmp_path / "run")
    with pytest.raises(UserError, match="no method 'lorra'"):
        run_tiny(model_folder, data_file, tmp_path / "run", method="lorra")
