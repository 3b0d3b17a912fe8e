"""Short passes padded, recorded and replayed, or compiled: the same losses, gradients and weights.

The truth is the training step without any of it. A CPU has no CUDA graphs: there a stand-in runs the recorded pass
again, on the tensors that stay, which is what a graph does; the same tests take real ones where there is a GPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import stir
from tiny_models import causal
from torch.nn.functional import pad

import loraloom.model  # noqa: F401  it registers attention by documents
from loraloom import graphs as graphs_file
from loraloom import methods
from loraloom.adapt import Adapters
from loraloom.adapter import AdapterSpec
from loraloom.attention import NAME
from loraloom.compiling import Compiled, compile_layers, compile_seconds, uncompile
from loraloom.config import TrainConfig, resolve, with_values
from loraloom.data import Example
from loraloom.errors import NonFinite, UserError
from loraloom.fast import engage
from loraloom.graph_shapes import padded, rounded, shape_for, shape_of
from loraloom.graphs import (
    KEPT,
    CudaRecorder,
    Graphs,
    adapters_reason,
    graph_reason,
    make_graphs,
)
from loraloom.incoming import quantize_model
from loraloom.nll import nll_sum
from loraloom.optim import make_optimizer
from loraloom.packing import IGNORED, Batch, pack
from loraloom.packing import batch as make_batch
from loraloom.products8 import use_fp8
from loraloom.step import StepStats, accumulate, train_step

PAD = 256
CONFIG, _ = resolve(None, {"model": "m", "data": "d", "output": "o"})
EXACT = {"rtol": 1e-10, "atol": 1e-13}  # float64 sums in another order


class Again:
    """A recorder that runs the pass again, and counts."""

    def __init__(self) -> None:
        self.warmed = self.recorded = 0

    def warm(self, run: Callable[[], torch.Tensor], *, first: bool) -> None:
        assert first == (not self.recorded)
        self.warmed += 1
        run()

    def crowded(self) -> str | None:
        return None

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.recorded += 1
        return run


def examples(count: int, *, seed: int = 0, least: int = 4, most: int = 40) -> list[Example]:
    gen = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = int(torch.randint(least, most, (), generator=gen))
        ids = torch.randint(0, 256, (length,), generator=gen).tolist()
        masked = [1, length // 2, length - 1, length][i % 4]
        made.append(Example(ids, [IGNORED] * masked + ids[masked:], f"rows:{seed}.{i}"))
    return made


def packed(count: int, *, micro_tokens: int = 256, **more: Any) -> list[Batch]:
    return pack(examples(count, **more), micro_tokens=micro_tokens, packing=True, pad_id=PAD)


def double(kind: str = "llama", method: str = "lora", **more: Any) -> tuple[Any, Adapters]:
    """A model and an adapter that has left its start, in float64."""
    model = causal(kind, scale=2.0).double()
    adapters = Adapters(model)
    adapters.add("a", AdapterSpec(method=method, r=3, **more))
    for site in adapters.adapters["a"].sites.values():
        for tensor in site.p.values():
            tensor.data = tensor.data.double()
    stir(adapters)
    adapters.train()
    return model, adapters


def train(
    model: Any, adapters: Adapters, steps: list[list[Batch]], backward: Any = accumulate
) -> tuple[list[StepStats], list[torch.Tensor]]:
    optimizer = make_optimizer(adapters.groups(1e-2), TrainConfig())
    stats = [
        train_step(model, adapters, optimizer, step, step=i, num_steps=9, max_norm=1.0, backward=backward)
        for i, step in enumerate(steps)
    ]
    return stats, [parameter.detach().clone() for parameter in adapters.parameters()]


def close(one: Any, other: Any) -> None:
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert (mine.targets, mine.tokens) == (theirs.targets, theirs.tokens)
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-9)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-7)
    for mine, theirs in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


# ---- shapes -------------------------------------------------------------------------------------------------


def test_sizes_are_few_and_near() -> None:
    sizes = [rounded(n) for n in range(1, 2049)]
    assert len(set(sizes)) == 16
    assert all(n <= size < 1.25 * n + 64 for n, size in zip(range(1, 2049), sizes, strict=True))
    long = [rounded(n) for n in range(2049, 16385)]
    assert all(n <= size <= 1.0625 * n for n, size in zip(range(2049, 16385), long, strict=True))
    assert sizes + long == sorted(sizes + long)
    assert len(set(long)) == 48


@pytest.mark.parametrize(("count", "length"), [(1, 64), (2, 32), (4, 48)])
def test_documents_of_one_length_that_fill_a_line_stay_known(count: int, length: int) -> None:
    rows = [replace(row, ids=row.ids * 99, labels=row.labels * 99) for row in examples(count)]
    rows = [replace(row, ids=row.ids[:length], labels=row.labels[:length]) for row in rows]
    made = padded(make_batch([list(enumerate(rows))], PAD, length=count * length), PAD)
    assert made.documents.known
    assert shape_of(made).even
    assert made.documents.lengths == (length,) * count
    graphs = Graphs(Again(), pad_id=PAD, most=8, most_even=count * length)
    assert graphs.takes(graphs.pad(made))
    assert not Graphs(Again(), pad_id=PAD, most=8, most_even=count * length - 1).takes(made)
    results = [train(*double("gpt2"), [[made]] * 3), train(*double("gpt2"), [[made]] * 3, graphs)]
    close(*results)
    assert (graphs.recorded, graphs.replayed) == (1, 2)
    uneven = packed(2, micro_tokens=count * length, least=9, most=30)[0]
    assert not graphs.takes(graphs.pad(uneven))
    assert not Graphs(Again(), pad_id=PAD).pad(uneven).documents.known


class Crowded(Again):
    def crowded(self) -> str | None:
        return "graphs keep 9 GB"


def test_without_memory_for_both_passes_run_as_ever() -> None:
    plain = [packed(6, seed=seed) for seed in (0, 1)]
    graphs = Graphs(Crowded(), pad_id=PAD)
    ready = [[graphs.pad(batch) for batch in step] for step in plain]
    close(train(*double("gpt2"), plain), train(*double("gpt2"), ready, graphs))
    assert (graphs.stopped, graphs.recorded) == ("graphs keep 9 GB", 0)
    asked = Graphs(Crowded(), pad_id=PAD, strict=True)
    close(train(*double("gpt2"), plain), train(*double("gpt2"), ready, asked))
    assert asked.recorded


@pytest.mark.parametrize("count", [1, 2, 7, 40, 200])
@pytest.mark.parametrize("most", [6, 300])
def test_a_padded_batch_holds_the_same_and_nothing_else(count: int, most: int) -> None:
    for batch in packed(count, micro_tokens=2048, most=most):
        made, shape = padded(batch, PAD), shape_for(batch)
        assert shape_of(made) == shape
        assert (made.targets, made.rows) == (batch.targets, batch.rows)
        for (b, start, stop), (row, first, behind) in zip(batch.spans, made.spans, strict=True):
            assert row == 0
            for name in ("ids", "labels", "position", "token"):
                assert torch.equal(getattr(batch, name)[b, start:stop], getattr(made, name)[0, first:behind])
        own = len(batch.target_at)
        assert torch.equal(made.target_at[:own], batch.target_at)
        assert not made.target_at[own:].any()
        assert made.labels[0, 0] == IGNORED  # where those added point
        assert int((made.labels != IGNORED).sum()) == int((batch.labels != IGNORED).sum())
        starts = made.documents.starts.tolist()
        assert starts[: len(batch.documents.starts)] == batch.documents.starts.tolist()
        assert starts == sorted(starts)
        assert (starts[0], starts[-1], len(starts)) == (0, shape.tokens, shape.documents + 1)
        lengths = made.documents.starts.diff()
        assert int(lengths.max()) <= min(shape.longest, batch.documents.longest)
        assert sum(made.documents.lengths) > shape.tokens  # told to be bounds
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
        assert torch.equal(made.position[0], positions)  # restart just where documents do
        assert not made.documents.known
        assert not made.documents.equal


def test_rows_that_are_no_documents_stay_rows() -> None:
    (batch,) = pack(examples(3), micro_tokens=256, packing=False, pad_id=PAD)
    with pytest.raises(ValueError, match="packed"):
        padded(batch, PAD)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "neox"])
def test_padding_moves_neither_loss_nor_gradient(kind: str) -> None:
    model, adapters = double(kind)
    for batch in packed(9):
        found = []
        for one in (batch, padded(batch, PAD)):
            loss = nll_sum(model, one)
            found.append((loss.detach(), *torch.autograd.grad(loss, adapters.parameters())))
        rel = 1e-10 if kind == "gpt2" else 3e-6  # norms and angles are float32 in the others
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=rel, atol=rel / 10)


# ---- replays ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "lorapro", "adapterh"])
def test_steps_are_those_without_graphs(method: str) -> None:
    """Several passes a step, one of which is too long for a graph, and shapes that come again."""
    seeds = [0, 1, 0, 2, 1]
    plain = [packed(12, micro_tokens=128, seed=seed, most=90) for seed in seeds]
    recorder = Again()
    graphs = Graphs(recorder, pad_id=PAD, most=112)
    ready = [[graphs.pad(batch) for batch in step] for step in plain]
    assert {batch.documents.known for step in ready for batch in step} == {True, False}
    results = [train(*double("gpt2", method), plain), train(*double("gpt2", method), ready, graphs)]
    close(*results)
    assert 0 < recorder.recorded == len(graphs.kept) < sum(not b.documents.known for s in ready for b in s)
    assert graphs.stopped is None


def test_gradients_go_to_buffers_that_stay() -> None:
    model, adapters = double("gpt2")
    graphs = Graphs(Again(), pad_id=PAD)
    steps = [[graphs.pad(batch) for batch in packed(5, seed=seed)] for seed in (0, 1, 2)]
    optimizer = make_optimizer(adapters.groups(1e-2), TrainConfig())
    places = []
    for i, step in enumerate(steps):
        seen: list[int] = []
        train_step(
            model,
            adapters,
            optimizer,
            step,
            step=i,
            num_steps=9,
            max_norm=None,
            inspect=lambda seen=seen: seen.extend(p.grad.data_ptr() for p in adapters.parameters()),
            backward=graphs,
        )
        places.append(seen)
        assert all(parameter.grad is None for parameter in adapters.parameters())
    assert places[0] == places[1] == places[2]


def test_a_tensor_without_gradient_stays_without() -> None:
    """Weight decay and moments must not move what the loss does not reach."""
    model, adapters = double("gpt2")
    spare = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    next(iter(adapters.adapters["a"].sites.values())).p["spare"] = spare
    graphs = Graphs(Again(), pad_id=PAD)
    train(model, adapters, [[graphs.pad(batch) for batch in packed(5)]] * 2, graphs)
    assert torch.equal(spare.detach(), torch.ones(3, dtype=torch.float64))
    assert spare not in graphs.gradients
    assert len(graphs.gradients) == len(adapters.parameters()) - 1


def test_what_is_recorded_has_a_limit() -> None:
    model, adapters = double("gpt2")
    graphs = Graphs(Again(), pad_id=PAD)
    one = padded(packed(3)[0], PAD)
    different = [replace(one, target_at=pad(one.target_at, (0, more))) for more in range(KEPT + 3)]
    train(model, adapters, [[batch] for batch in different], graphs)
    assert graphs.recorded == KEPT
    assert graphs.stopped is not None
    assert "shapes differ too much" in graphs.stopped
    assert graphs.pad(packed(3)[0]).documents.known  # from now on nothing is padded


class Broken(Again):
    def warm(self, run: Callable[[], torch.Tensor], *, first: bool) -> None:
        run()
        raise RuntimeError("called a synchronizing CUDA operation\nsecond line")


def test_a_pass_that_cannot_be_recorded_runs_as_ever_and_says_why() -> None:
    plain = [packed(6, seed=seed) for seed in (0, 1)]
    graphs = Graphs(Broken(), pad_id=PAD)
    ready = [[graphs.pad(batch) for batch in step] for step in plain]
    close(train(*double("gpt2"), plain), train(*double("gpt2"), ready, graphs))
    assert graphs.stopped == "a pass cannot be recorded: called a synchronizing CUDA operation"
    with pytest.raises(UserError, match=r"train\.graphs=true: a pass cannot be recorded"):
        train(*double("gpt2"), ready, Graphs(Broken(), pad_id=PAD, strict=True))


class Full(Again):
    """Memory for one recording; the second breaks off, which ending it turns into another error."""

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        if self.recorded:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        return super().record(run)


class FullAtOnce(Again):
    def warm(self, run: Callable[[], torch.Tensor], *, first: bool) -> None:
        run()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("recorder", [Full, FullAtOnce])
def test_a_recording_without_memory_gives_way_to_passes_as_ever(
    recorder: type[Again], monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[bool] = []
    monkeypatch.setattr(graphs_file, "release_buffers", lambda: released.append(True))
    plain = [packed(6), packed(14, micro_tokens=512, seed=3), packed(6, seed=1)]
    graphs = Graphs(recorder(), pad_id=PAD)
    ready = [[graphs.pad(batch) for batch in step] for step in plain]
    assert len({shape_of(batch) for step in ready for batch in step}) > 1
    close(train(*double("gpt2"), plain), train(*double("gpt2"), ready, graphs))
    assert graphs.stopped is not None
    assert "a pass cannot be recorded" in graphs.stopped
    assert not graphs.kept  # their memory is given back
    assert released == [True]
    with pytest.raises(RuntimeError, match=r"out of memory|previous error"):
        train(*double("gpt2"), ready, Graphs(recorder(), pad_id=PAD, strict=True))


def test_what_follows_waits_for_a_pass_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            waits.append((self.name, other.name))

    def fail() -> torch.Tensor:
        raise RuntimeError("a warm pass")

    recorder = CudaRecorder.__new__(CudaRecorder)
    recorder.device, recorder.stream = torch.device("cuda"), Stream("side")  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    with pytest.raises(RuntimeError, match="a warm pass"):
        recorder.warm(fail, first=True)
    assert waits == [("side", "main"), ("main", "side")]


def test_rows_that_break_a_replayed_step_are_named() -> None:
    model, adapters = double("gpt2")
    rows = examples(6)
    rows[4] = replace(rows[4], ids=[255, *rows[4].ids[1:]])
    rows = [
        replace(row, ids=[254 if t == 255 and i != 4 else t for t in row.ids]) for i, row in enumerate(rows)
    ]
    model.get_input_embeddings().weight.data = model.get_input_embeddings().weight.data.clone()
    model.get_input_embeddings().weight.data[255] = float("nan")
    model.lm_head.weight = torch.nn.Parameter(
        model.lm_head.weight.detach().nan_to_num(0.0), requires_grad=False
    )
    graphs = Graphs(Again(), pad_id=PAD)
    step = [graphs.pad(batch) for batch in pack(rows, micro_tokens=256, packing=True, pad_id=PAD)]
    start = [parameter.detach().clone() for parameter in adapters.parameters()]
    with pytest.raises(NonFinite) as caught:
        train(model, adapters, [step], graphs)
    assert caught.value.details == ["rows:0.4: its loss is not finite"]
    assert all(map(torch.equal, adapters.parameters(), start))


# ---- whether ------------------------------------------------------------------------------------------------


def test_what_speaks_against_graphs_is_said() -> None:
    model, adapters = double("gpt2")
    gpu = torch.device("cuda")

    def why(**values: Any) -> str | None:
        return graph_reason(adapters, with_values(CONFIG, values), model, gpu)

    assert "this run is on cpu" in str(graph_reason(adapters, CONFIG, model, torch.device("cpu")))
    assert "data.packing" in str(why(**{"data.packing": False}))
    assert "train.micro_tokens=fit" in str(why(**{"train.micro_tokens": "fit"}))
    assert "train.micro_tokens=fit" in str(graph_reason(adapters, CONFIG, model, gpu, fitted=True))
    assert "in attention sdpa" in str(why())
    model.set_attn_implementation(NAME)
    assert str(why()).endswith("takes 16 bits, and the model is in float64")
    model.bfloat16()
    assert "own logits" in str(why()) or why() is None
    assert adapters_reason(adapters) is None
    for spec, words in (
        ({"dropout": 0.1}, "dropout"),
        ({"method": "adalora"}, "penalty"),
        ({"method": "alora", "options": {"invocation": [3]}}, "chooses among tokens"),
    ):
        assert words in str(adapters_reason(double("gpt2", **spec)[1])), spec
    adapters.parameters()[0].register_hook(lambda gradient: gradient)
    assert "hooks" in str(adapters_reason(adapters))


def test_the_setting_is_honoured_or_refused() -> None:
    cpu = torch.device("cpu")
    assert make_graphs(False, None, cpu, pad_id=0, tokens=100) == (None, "train.graphs=false")
    assert make_graphs("auto", "a reason", cpu, pad_id=0, tokens=100) == (None, "a reason")
    made, words = make_graphs("auto", None, cpu, pad_id=0, tokens=50_000)
    assert made is None
    assert "50,000 tokens" in words
    with pytest.raises(UserError, match=r"train\.graphs=true: a reason"):
        make_graphs(True, "a reason", cpu, pad_id=0, tokens=100)


# ---- on a GPU -----------------------------------------------------------------------------------------------


def on_gpu(method: str, quantize: str | None) -> tuple[Any, Adapters]:
    """A model in attention by documents, in bfloat16, with heads that its kernels take."""
    model = causal("llama", scale=2.0)
    model.set_attn_implementation(NAME)
    model = model.bfloat16().cuda()
    if quantize is not None:
        quantize_model(model, quantize.removesuffix(" in 8 bits"))
        if quantize.endswith("8 bits"):
            use_fp8(model, "auto", torch.device("cuda"))
    adapters = Adapters(model)
    adapters.add("a", AdapterSpec(method=method, r=4))
    if method == "lora":
        assert engage(adapters)[0] == "fused layers: 2 of 2"
    stir(adapters)
    adapters.train()
    return model, adapters


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("quantize", [None, "nf4", "nf4 in 8 bits"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_real_graphs_train_as_steps_do(method: str, quantize: str | None) -> None:
    """The same padded batches with and without graphs: the same kernels, so nearly the same bits."""
    seeds = [0, 1, 2, 0, 1, 2]
    plain = [packed(12, micro_tokens=256, seed=seed, most=90) for seed in seeds]
    graphs = Graphs(CudaRecorder(torch.device("cuda")), pad_id=PAD, strict=True)
    ready = [[graphs.pad(batch).to("cuda") for batch in step] for step in plain]
    (eager, moved), (replayed, other) = (
        train(*on_gpu(method, quantize), ready),
        train(*on_gpu(method, quantize), ready, graphs),
    )
    assert graphs.replayed > 0
    assert graphs.stopped is None
    for one, two in zip(eager, replayed, strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-3)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=2e-2)
    for mine, theirs in zip(moved, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=5e-2, atol=5e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_nothing_in_a_step_waits_but_for_its_numbers() -> None:
    """Those come with an event, which torch does not count among what waits."""
    model, adapters = on_gpu("lora", None)
    optimizer = make_optimizer(adapters.groups(1e-3), TrainConfig())
    (batch, *_) = packed(12, most=90)
    step = [batch.to("cuda")]
    for i in range(3):
        train_step(model, adapters, optimizer, step, step=i, num_steps=9, max_norm=1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = train_step(model, adapters, optimizer, step, step=3, num_steps=9, max_norm=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats.grad_norm > 0


# ---- compiled layers ----------------------------------------------------------------------------------------


def test_compiled_layers_train_the_same() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here")
    steps = [packed(8, seed=seed) for seed in (0, 1)]
    runs = []
    for compiled in (False, True):
        model, adapters = double("gpt2")
        if compiled:
            layers = list(model.transformer.h)
            words = compile_layers(layers, torch.device("cpu"), backend="eager")
            assert words.startswith("compiled layers: 2 of 2")
            assert all(isinstance(layer.forward, Compiled) for layer in layers)
        runs.append(train(model, adapters, steps))
    close(*runs)
    assert compile_seconds() > 0
    uncompile(layers)
    assert not any("forward" in vars(layer) for layer in layers)


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = double("gpt2")
    layers, cpu = list(model.transformer.h), torch.device("cpu")
    for layer in layers:
        layer.__dict__["forward"] = layer.forward
    with pytest.raises(UserError, match="nothing is left to compile"):
        compile_layers(layers, cpu)
    with pytest.raises(UserError, match="layers are not found"):
        compile_layers([], cpu)
    coded = causal("gpt2")
    quantize_model(coded, "nf4")
    with pytest.raises(UserError, match="quantised weights"):
        compile_layers(list(coded.transformer.h), cpu)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        compile_layers(list(causal("gpt2").transformer.h), cpu)


def test_methods_with_a_penalty_are_those_that_are_refused() -> None:
    """A method that comes later is looked at too."""
    base = methods.base.Method
    with_penalty = {name for name in methods.names() if methods.find(name).penalty is not base.penalty}
    assert with_penalty == {"adalora"}
