"""Every tier gives the same bits as keeping everything; offloaded inputs leave the device, and come back, in order."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_optim8 import AnyOrder
from tiny import stir
from tiny_models import causal
from transformers import LlamaConfig

from loraloom import methods
from loraloom.adapt import Adapters, attach
from loraloom.adapter import AdapterSpec
from loraloom.attention import NAME
from loraloom.config import RunConfig, TrainConfig, resolve
from loraloom.data import Example
from loraloom.errors import UserError
from loraloom.fit import EASILY, Gpu, choose, tiers
from loraloom.frozen import Frozen
from loraloom.incoming import quantize_model
from loraloom.memory import Predictor
from loraloom.nll import nll_sum
from loraloom.optim import make_optimizer
from loraloom.packing import IGNORED, StepPlan, pack
from loraloom.paging import CudaLanes
from loraloom.recompute import TIERS, Choice, Recomputed, Shelf, apply, fuse
from loraloom.step import train_step
from loraloom.workload import Measured, assumed
from loraloom.workshop import choose_recompute, decided_by

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SGD = TrainConfig(optimizer="sgd", momentum=0.0, weight_decay=0.0)
PER_LAYER = ("lora", "dora", "hira", "vera", "bitfit", "adapterh", "adapterl")


def examples(count: int = 6) -> list[Example]:
    gen = torch.Generator().manual_seed(3)
    made = []
    for i in range(count):
        ids = torch.randint(0, 256, (int(torch.randint(6, 30, (), generator=gen)),), generator=gen).tolist()
        made.append(Example(ids, [-100, *ids[1:]], f"rows:{i}"))
    return made


def adapted(kind: str, method: str = "lora", *, dropout: float = 0.0, quantize: bool = False) -> Adapters:
    """A float32 model of two layers and an adapter that has left its start."""
    model = causal(kind, scale=2.0, attention="eager").to(DEVICE)
    if quantize:
        quantize_model(model, "nf4")
    adapters = Adapters(model)
    adapters.add("a", AdapterSpec(method=method, r=3, dropout=dropout))
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.1 * torch.linspace(-1, 1, parameter.numel()).view_as(parameter).to(parameter))
    adapters.train()
    return adapters


def two_steps(adapters: Adapters) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """What two steps of two micro-batches each say, and what they leave."""
    optimizer = make_optimizer(adapters.groups(0.1), SGD)
    batches = pack(examples(), micro_tokens=64, packing=True, pad_id=256)
    assert len(batches) > 1
    said = [
        train_step(adapters.model, adapters, optimizer, batches, step=step, num_steps=2, max_norm=None)
        for step in range(2)
    ]
    return said, {name: p.detach().cpu() for name, p in adapters.named_parameters()}


def check_bits(fast: bool = False, **about: Any) -> None:
    results = {}
    for tier in TIERS if fast else ("none", "full", "offload"):
        adapters = adapted(**about)
        if fast:
            adapters.model.set_attn_implementation(NAME)
            fuse(adapters, TrainConfig(fast=True), gpu=False)
            assert len(adapters.fast) == 2
        apply(adapters.model, adapters, tier)
        results[tier] = two_steps(adapters)
    said, left = results.pop("none")
    assert all(one.grad_norm > 0 for one in said)
    for tier, (also_said, also_left) in results.items():
        assert also_said == said, tier
        assert all(torch.equal(left[name], also_left[name]) for name in left), tier


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize(("dropout", "quantize"), [(0.0, False), (0.3, False), (0.3, True)])
def test_every_tier_gives_the_same_bits(kind: str, dropout: float, quantize: bool) -> None:
    check_bits(kind=kind, dropout=dropout, quantize=quantize)


@pytest.mark.parametrize(("dropout", "quantize"), [(0.0, False), (0.3, True)])
def test_fused_layers_too_and_their_mlp_alone(dropout: float, quantize: bool) -> None:
    check_bits(fast=True, kind="llama", dropout=dropout, quantize=quantize)


@pytest.mark.parametrize("tier", ["full", "offload"])
def test_a_fused_layer_that_is_computed_again_leaves_its_last_product_out(
    tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads the output then; and the layer's own code, which knows no turns, is computed again as ever."""
    adapters = adapted(kind="llama")
    adapters.model.set_attn_implementation(NAME)
    fuse(adapters, TrainConfig(fast=True), gpu=False)
    apply(adapters.model, adapters, tier)
    made: list[str] = []
    times = Frozen.times

    def counted(self: Any, *args: Any) -> Any:
        made.append(self.called)
        return times(self, *args)

    for layer in adapters.fast:
        for group in layer.parts.groups():
            group.frozen.called = group.names[0].rpartition(".")[2]  # type: ignore[attr-defined]
    monkeypatch.setattr(Frozen, "times", counted)
    (batch, *_) = (one.to(DEVICE) for one in pack(examples(), micro_tokens=999, packing=True, pad_id=256))
    nll_sum(adapters.model, batch)  # proves the head, once
    made.clear()
    nll_sum(adapters.model, batch).backward()
    found = Counter(made)
    assert (found["q_proj"], found["o_proj"], found["gate_proj"], found["down_proj"]) == (4, 4, 4, 2)
    adapters.fast[0].released = True
    made.clear()
    nll_sum(adapters.model, batch).backward()
    assert Counter(made)["down_proj"] == 1


@pytest.mark.parametrize("method", PER_LAYER)
def test_methods_that_are_no_pairs_too(method: str) -> None:
    check_bits(kind="gpt2" if method == "bitfit" else "llama", method=method)


# ---- the shelf ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order", [("in", "main", "out"), ("out", "in", "main"), ("main", "out", "in"), *range(40)]
)
def test_the_shelf_holds_in_any_order_that_its_lanes_allow(
    order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is let go is overwritten by the next work, and handed out again."""
    lanes, size, layers = AnyOrder(order), 37, 5
    blocks, empty = [torch.zeros(size) for _ in range(3)], torch.empty
    given = iter(blocks * 99)
    host = {"dtype": torch.uint8}
    monkeypatch.setattr(torch, "empty", lambda n, **kw: empty(n, **kw) if kw == host else next(given))
    shelf, seen, wanted = Shelf(lanes, piece=64), [], []
    for step in range(3):
        tickets: list[Any] = []
        before: list[torch.Tensor] = []
        for layer in range(layers):
            h = torch.full((size,), torch.nan)
            lanes.call(lambda h=h, value=10.0 * step + layer: h.copy_(torch.arange(size) + value))
            tickets.append(shelf.put(h))
            held = None if shelf.leaving is None else shelf.leaving[1]
            assert held is not None
            assert held.data_ptr() == h.data_ptr()
            for gone in before:
                lanes.call(lambda h=gone: h.fill_(-1.0))
            before = [h]
        while tickets:
            ticket = tickets.pop()
            x = shelf.get(ticket)
            lanes.call(lambda x=x: seen.append(x.clone()))
            lanes.call(lambda x=x: x.fill_(-2.0))
            wanted.append(torch.arange(size) + 10.0 * step + len(tickets))
            del ticket
    lanes.finish()
    assert torch.equal(torch.stack(seen), torch.stack(wanted))
    assert shelf.made == layers * 3  # pieces of 64 bytes for 148
    assert len(shelf.free) == shelf.made


def offloading(kind: str = "llama", layers: int = 2) -> tuple[Adapters, Shelf, Any]:
    adapters = adapted(kind)
    apply(adapters.model, adapters, "offload")
    stack = adapters.model.model.layers
    return adapters, stack[0].forward.shelf, stack


def test_inputs_leave_the_device_while_the_next_layer_runs_and_host_memory_is_used_again() -> None:
    model: Any = causal("llama").to(DEVICE)
    shape = LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 5, "layer_types": None})
    model = type(model)(shape).eval().to(DEVICE)
    adapters = attach(model, r=2)
    adapters.train()
    apply(model, adapters, "offload")
    shelf, storages = model.model.layers[0].forward.shelf, []

    def look(module: Any, args: Any) -> None:
        storages.append(weakref.ref(args[0].untyped_storage()))
        alive = {number for number, ref in enumerate(storages[:-1]) if ref() is not None}
        assert alive <= {0, len(storages) - 2}  # the model's own forward holds the first one

    for layer in model.model.layers:
        layer.register_forward_pre_hook(look)
    ids = torch.arange(24, device=DEVICE)[None]
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        for rows in (2, 1, 2, 2):
            storages.clear()
            loss = model(input_ids=ids.expand(rows, -1), use_cache=False).logits.square().mean()
            assert len(shelf.free) == shelf.made - 5
            loss.backward()
            del loss
            assert shelf.made == len(shelf.free) == 5
            assert shelf.leaving is None
            assert shelf.coming is None
    finally:
        gc.enable()


def test_a_graph_that_is_kept_can_be_gone_back_through_twice() -> None:
    adapters, shelf, _ = offloading()
    ids = torch.arange(24, device=DEVICE)[None]
    loss = adapters.model(input_ids=ids, use_cache=False).logits.square().mean()
    first = torch.autograd.grad(loss, adapters.parameters(), retain_graph=True)
    again = torch.autograd.grad(loss, adapters.parameters())
    assert all(map(torch.equal, first, again))
    del loss, first, again
    assert len(shelf.free) == shelf.made


def test_two_forward_passes_before_their_backward_passes() -> None:
    found = []
    for tier in ("none", "offload"):
        adapters = adapted("llama")
        apply(adapters.model, adapters, tier)
        texts = torch.arange(48, device=DEVICE).view(2, 1, 24)
        with adapters.batch(step=0):
            losses = [adapters.model(input_ids=ids, use_cache=False).logits.square().mean() for ids in texts]
            for loss in losses:  # the first pass's inputs stand below the second's
                loss.backward()
        found.append([p.grad.clone() for p in adapters.parameters()])
    assert all(map(torch.equal, *found))


def test_host_memory_that_cannot_be_pinned_is_pageable_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = torch.empty

    def refuse(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("out of pinned memory\nmore")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    shelf = Shelf(CudaLanes.__new__(CudaLanes), piece=64)
    with pytest.warns(
        UserWarning, match=r"no more pinned memory \(out of pinned memory\); the rest is pageable"
    ):
        shelf.take(130)
    assert shelf.made == 3


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU: copies are done at once here")
def test_offloading_on_a_gpu_takes_less_of_it() -> None:
    shape = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=512, num_hidden_layers=24, num_attention_heads=4
    )
    peaks, grads = {}, {}
    for tier in ("none", "full", "offload"):
        gc.collect()  # what others left, the last tier's model among it
        before = torch.cuda.memory_allocated()
        torch.manual_seed(0)
        model: Any = causal("llama")
        model = type(model)(shape).eval().to(DEVICE, torch.bfloat16)
        adapters = attach(model, r=2)
        stir(adapters)
        adapters.train()
        apply(model, adapters, tier)
        ids = torch.randint(64, (1, 8192), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            for parameter in adapters.parameters():
                parameter.grad = None
            model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
        peaks[tier] = torch.cuda.max_memory_allocated() - before
        grads[tier] = [p.grad.float() for p in adapters.parameters()]
        del model, adapters
    size = 8192 * 512 * 2
    assert peaks["none"] > peaks["full"] + 10 * size
    assert peaks["full"] - peaks["offload"] == pytest.approx(21 * size, abs=3 * size)
    # FlashAttention adds up dq by atomics: a tier differs from itself by up to 0.8 % of a gradient's norm
    for one, other in zip(grads["full"], grads["offload"]):
        assert float((one - other).norm() / one.norm()) < 0.03


# ---- where it goes, and what it refuses ---------------------------------------------------------------------


def test_a_layer_gets_its_own_forward_back() -> None:
    adapters = adapted("llama")
    layers = adapters.model.model.layers
    for tier in ("full", "offload", "full"):
        apply(adapters.model, adapters, tier)
        held = vars(layers[0])["forward"]
        assert isinstance(held, Recomputed)
        assert (held.shelf is None) == (tier == "full")
        assert not isinstance(held.inner, Recomputed)
    with pytest.raises(UserError, match="carries adapters already"):
        Adapters(adapters.model)
    apply(adapters.model, adapters, "none")
    assert all("forward" not in vars(layer) for layer in layers)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("tier", ["full", "offload"])
def test_detaching_takes_recomputation_off_and_lets_the_shelf_go(tier: str, fast: bool) -> None:
    adapters = adapted("llama")
    model: Any = adapters.model
    if fast:
        model.set_attn_implementation(NAME)
        fuse(adapters, TrainConfig(fast=True), gpu=False)
        assert len(adapters.fast) == 2
    apply(model, adapters, tier)
    shelf = model.model.layers[0].forward.shelf
    two_steps(adapters)
    gone = [weakref.ref(piece) for piece in shelf.free] if shelf else []
    assert bool(gone) == (tier == "offload")
    del shelf
    adapters.detach()
    assert not adapters.undo
    assert all("forward" not in vars(module) for module in model.modules())
    gc.collect()
    assert all(ref() is None for ref in gone)
    attach(model, r=2).detach()


def test_a_tier_that_someone_still_holds_is_off() -> None:
    adapters = adapted("llama")
    apply(adapters.model, adapters, "offload")
    layer = adapters.model.model.layers[0]
    inside = layer.forward
    layer.forward = lambda *args, **kwargs: inside(*args, **kwargs)  # someone's own code around it
    apply(adapters.model, adapters, "none")
    assert not adapters.undo
    assert (inside.released, inside.shelf) == (True, None)
    want = two_steps(adapted("llama"))[0]
    assert two_steps(adapters)[0] == want


def test_generation_and_caches_pass_through() -> None:
    adapters = adapted("llama")
    adapters.eval()
    ids = torch.arange(5, device=DEVICE)[None]
    want = adapters.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=256)
    apply(adapters.model, adapters, "offload")
    assert torch.equal(
        adapters.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=256), want
    )
    cache = adapters.model(input_ids=ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("tier", ["full", "offload"])
def test_a_recomputation_for_another_choice_is_refused(tier: str) -> None:
    adapters = adapted("llama")
    adapters.add("b", AdapterSpec(r=2))
    apply(adapters.model, adapters, tier)
    adapters.train()
    with adapters.routed(["a", "b"]):
        loss = adapters.model(torch.arange(12, device=DEVICE).view(2, 6), use_cache=False).logits.sum()
    with pytest.raises(RuntimeError, match="call backward"):
        loss.backward()


def test_the_mlp_alone_needs_fused_layers() -> None:
    adapters = adapted("llama")
    with pytest.raises(UserError, match="gate_up: LlamaForCausalLM runs without fused layers") as caught:
        apply(adapters.model, adapters, "gate_up")
    assert caught.value.hint == "--set train.recompute=full"


def test_no_such_tier() -> None:
    adapters = adapted("llama")
    with pytest.raises(ValueError, match="is none of"):
        apply(adapters.model, adapters, "some")


# ---- which one a run takes ----------------------------------------------------------------------------------


PER_TOKEN = {"none": 100, "full": 20, "offload": 5}  # bytes
FIXED = 10_000


class Predicts:
    """Stands in for memory.Predictor: a pass needs FIXED and PER_TOKEN, and this model cannot do gate_up."""

    def __init__(self, settings: RunConfig, tier: str = "none", method: str = "lora") -> None:
        self.config, self.tier = settings, tier
        self.whole = SimpleNamespace(adapter=SimpleNamespace(method=methods.find(method)))

    def at(self, tier: str) -> Any:
        if tier not in PER_TOKEN:
            raise UserError(f"no {tier} here")
        return Predicts(self.config, tier)

    def predict(self, tokens: int) -> Any:
        return SimpleNamespace(needed=FIXED + tokens * PER_TOKEN[self.tier], parts={})


WORK: Any = SimpleNamespace(batches=lambda tokens: tokens, step_tokens=None, usual_step=None)


def config(**changes: Any) -> RunConfig:
    return resolve(None, {"model": "none", "data": "none", "output": "none", **changes})[0]


def long_steps(usual: int | None = 8193) -> Any:
    return SimpleNamespace(fullest=lambda tokens: [tokens], **vars(WORK) | {"usual_step": usual})


def stand_in(method: str = "lora", **changes: Any) -> Any:
    return Predicts(config(**changes), method=method)


def chosen(room: int, **changes: Any) -> Any:
    return choose(stand_in(**changes), WORK, Gpu("a GPU", room))


def needed(tier: str, tokens: int = 8192) -> int:
    return FIXED + tokens * PER_TOKEN[tier]


def test_the_least_that_fits_is_taken() -> None:
    for tier, other in (("none", None), ("full", "none"), ("offload", "full")):
        one = chosen(needed(tier))
        assert (one.tier, one.tokens) == (tier, 8192)
        assert (f"{other} would need" in one.reason) == (other is not None)
    least = chosen(needed("offload") - 1)
    assert least.tier == "offload"
    assert "the smallest, and it needs" in least.reason
    assert chosen(needed("full", 100), **{"train.micro_tokens": 100}).tier == "full"


def test_what_is_set_is_taken_and_a_pass_is_fitted_to_it() -> None:
    fit = {"train.micro_tokens": "fit"}
    one = chosen(needed("none"), **{"train.recompute": "offload"})
    assert (one.tier, one.tokens, one.reason) == ("offload", 8192, "as set")
    one = chosen(needed("full", 16384), **fit)
    assert (one.tier, one.tokens) == ("full", 16384)  # the first tier with room for the usual pass
    one = chosen(needed("offload", 4096), **fit)
    assert (one.tier, one.tokens) == ("offload", 4096)
    one = chosen(needed("none", 4096), **fit | {"train.recompute": "none"})
    assert (one.tier, one.tokens) == ("none", 4096)
    with pytest.raises(UserError, match="the smallest pass needs"):
        chosen(needed("offload", 64) - 1, **fit)


def test_a_pass_is_longer_where_that_fits_easily_and_usual_steps_have_the_tokens() -> None:
    room = math.ceil(needed("none", 16384) / 0.9)
    one = choose(stand_in(), long_steps(), Gpu("a GPU", room))
    assert (one.tier, one.tokens) == ("none", 16384)
    assert "one of 16,384 fits easily" in one.reason
    assert choose(stand_in(), long_steps(8192), Gpu("a GPU", room)).tokens == 8192
    assert choose(stand_in(), long_steps(None), Gpu("a GPU", room)).tokens == 8192
    tight = choose(stand_in(), long_steps(), Gpu("a GPU", room - 10))
    assert tight.tokens == 8192
    assert choose(stand_in(), long_steps(), Gpu("a GPU", needed("full", 16384) * 2)).tokens == 8192
    for tier in ("none", "full"):  # who says what is kept has planned for the usual pass
        asked = stand_in(**{"train.recompute": tier})
        assert choose(asked, long_steps(), Gpu("a GPU", room)).tokens == 8192
    assert choose(stand_in(**{"train.micro_tokens": 8000}), long_steps(), Gpu("a GPU", room)).tokens == 8000
    assert choose(stand_in("eva"), long_steps(), Gpu("a GPU", room)).tokens == 8192
    assert choose(stand_in("loftq"), long_steps(), Gpu("a GPU", room)).tokens == 16384


NORMAL = torch.randn(2000, generator=torch.Generator().manual_seed(0))
MIXED = (5 + 1.2 * NORMAL).exp().clamp(16, 4096).int().tolist()


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([100] * 8000 + [9000] * 4, {"batch_tokens": 16384}),  # of which one row holds no second
        ([100] * 8000 + [8200] * 4, {"batch_size": 128}),
        ([100] * 3000 + [4096] * 25, {"batch_size": 128}),  # a later step may have more of them
        (MIXED, {"batch_size": 32}),  # long documents of many lengths take more than equal ones
    ],
)
def test_no_step_of_a_run_takes_much_more_than_the_longer_pass_that_was_planned(
    lengths: list[int], sizes: dict[str, int]
) -> None:
    examples: Any = [Example([1] * n, [IGNORED] + [1] * (n - 1), str(i)) for i, n in enumerate(lengths)]
    steps = StepPlan(lengths, seed=1, **sizes)
    work = Measured(examples, steps, packing=True)
    shape = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2)
    predictor = Predictor(config(**{"train.fast": True, "model.dtype": "bfloat16"}), shape)
    most = max(predictor.predict(made).allocated for made in work.fullest(16384))
    taken = work.packed([[examples[i] for i in step] for step in steps], 16384)
    every = [made for step in taken for made in step]
    heaviest = sorted(every, key=lambda made: made.ids.numel())[-20:]
    assert max(predictor.predict([made] * 2).allocated for made in heaviest) <= most / EASILY


def test_the_plan_of_memory_is_asked_where_the_settings_leave_something_open() -> None:
    asked: list[RunConfig] = []

    def fit(one: RunConfig, *_: Any) -> Choice:
        asked.append(one)
        return Choice("none", 16384, "it fits")

    gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    known = config(**{"train.recompute": "full"})
    assert choose_recompute(known, gpu, [], [], fit).tokens == 8192  # type: ignore[arg-type]
    assert choose_recompute(known, gpu, [], [], fit).reason == "as set"  # type: ignore[arg-type]
    assert not asked
    one = choose_recompute(config(), gpu, [], [], fit)  # type: ignore[arg-type]
    assert decided_by(one, config()) == {"train.recompute": "none", "train.micro_tokens": 16384}
    assert decided_by(one, config(**{"train.micro_tokens": 500})) == {"train.recompute": "none"}
    cpu: Any = SimpleNamespace(device=torch.device("cpu"))
    assert choose_recompute(config(), cpu, [], [], fit).tokens == 2048  # type: ignore[arg-type]
    assert len(asked) == 1


def test_what_cannot_be_predicted_is_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Predicts, tokens: int) -> Any:
        raise UserError("the memory of X cannot be predicted")

    monkeypatch.setattr(Predicts, "predict", refuse)
    for work in (WORK, long_steps()):
        one = choose(stand_in(), work, Gpu("a GPU", 10**9))
        assert (one.tier, one.tokens, one.reason) == ("none", 8192, "the memory of X cannot be predicted")


def test_what_the_model_cannot_is_left_out_with_the_reason() -> None:
    shape = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    work = assumed(config(), 256, 256)
    found = list(tiers(Predictor(config(**{"train.fast": False}), shape), work, 256))
    assert [one.name for one in found] == ["none", "gate_up", "full", "offload"]
    assert [one.found is None for one in found] == [False, True, False, False]
    assert "without fused layers" in found[1].reason
    sizes = [one.found.needed for one in found if one.found is not None]
    assert sizes[0] > sizes[1] > sizes[2]
