"""The loss in chunks: the kernel against cross-entropy in float64, the head against full logits, and all gradients."""

from __future__ import annotations

import os
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loraloom import head as heads
from loraloom.adapt import Adapters, attach
from loraloom.adapter import AdapterSpec
from loraloom.head import Head, chunks
from loraloom.kernels import cross_entropy as kernel
from loraloom.kernels import twin
from loraloom.kernels.cross_entropy import bent, cross_entropy, place_rows
from loraloom.nll import head_of, hidden_states, nll_sum, token_nll, whole_nll, why_whole_logits
from loraloom.packing import IGNORED, Batch

GPU = torch.cuda.is_available()
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EXACT = {"rtol": 1e-10, "atol": 1e-10}
PLAIN, MLP = tiny.PLAIN, tiny.MLP
GEMMA = PLAIN | MLP | {"num_key_value_heads": 2, "head_dim": 8}
MORE = {
    "gemma": lambda: tf.GemmaConfig(**GEMMA),
    "gemma2": lambda: tf.Gemma2Config(**GEMMA, final_logit_softcapping=2.0),
    "gemma3": lambda: tf.Gemma3TextConfig(**GEMMA),
    "granite": lambda: tf.GraniteConfig(**PLAIN, **MLP, num_key_value_heads=2, logits_scaling=8.0),
    "cohere": lambda: tf.CohereConfig(**PLAIN, **MLP, num_key_value_heads=2, logit_scale=0.3),
    "qwen3": lambda: tf.Qwen3Config(**GEMMA),
    "opt": lambda: tf.OPTConfig(**PLAIN, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32),
}


@pytest.fixture(scope="module")
def device() -> torch.device:
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    pytest.importorskip("triton")
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks where batches are tiny."""
    for name, value in {"CHUNK_BYTES": 1, "LEAST_ROWS": 3, "TILE_ROWS": 1}.items():
        monkeypatch.setattr(heads, name, value)


# ---- the kernel ---------------------------------------------------------------------------------------------


def truth(logits: Tensor, label: Tensor, scale: float, cap: float | None, weight: Tensor | None) -> Any:
    """nll and gradient in float64 by autograd."""
    l = logits.double().clone().requires_grad_()
    nll = F.cross_entropy(bent(l, scale, cap), label, reduction="none", ignore_index=IGNORED)
    (nll * (1.0 if weight is None else weight.double())).sum().backward()
    return nll.detach(), l.grad


def near(dtype: torch.dtype, cap: float | None = None) -> dict[str, float]:
    eps = torch.finfo(dtype).eps
    return {
        "rtol": 4 * eps,
        "atol": (16 if cap is None else 64) * max(eps, 2**-24) if eps < 1e-3 else 2 * eps,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_the_kernel_and_its_twin_equal_cross_entropy_in_float64(device, dtype, path):
    from loraloom.kernels.cross_entropy_triton import cases

    for logits, label, settings in cases(device):
        logits, wide = logits.to(dtype), torch.promote_types(dtype, torch.float32)
        weight = settings.get("weight_C")
        if weight is not None:
            settings = {**settings, "weight_C": weight.to(wide)}
        scale, cap = settings.get("scale", 1.0), settings.get("cap")
        expected, d_expected = truth(logits, label, scale, cap, weight)
        close = {k: v if dtype == torch.float64 else max(v, 3e-6) for k, v in near(wide, cap).items()}
        with twin.forced(path):
            grad = torch.full_like(logits, 7.0)
            nll = cross_entropy(logits, label, **settings, grad_CV=grad)
            alone = cross_entropy(logits, label, **settings)
            in_place = logits.clone()
            again = cross_entropy(in_place, label, **settings, grad_CV=in_place)
        assert nll.dtype == wide
        assert torch.equal(nll, alone)
        assert torch.equal(nll, again)
        assert torch.equal(grad, in_place)
        assert not grad[label == IGNORED].any()
        torch.testing.assert_close(nll.double(), expected, **close)
        # the interpreter cuts float32 off where a GPU rounds it
        step = torch.finfo(dtype).eps if dtype in DTYPES[2:] else 0.0
        torch.testing.assert_close(
            grad.double(), d_expected, rtol=step + close["rtol"], atol=step * 1e-3 + close["atol"]
        )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_rows_that_are_ignored_may_hold_anything(device, path):
    logits = torch.randn(4, 9, device=device)
    logits[1], logits[2, 3], logits[3, 0] = float("nan"), float("nan"), float("inf")
    label = torch.tensor([2, IGNORED, 4, 1], device=device)
    with twin.forced(path):
        nll = cross_entropy(logits, label, grad_CV=logits)
    assert nll.isfinite().tolist() == [True, True, False, False]
    assert nll[1] == 0
    assert not logits[1].any()


def test_definition_goes_over_rows_in_pieces(monkeypatch):
    logits, label = torch.randn(7, 50).double(), torch.tensor([1, 2, IGNORED, 4, 5, 6, 49])
    monkeypatch.setattr(kernel, "BLOCK", 100)
    expected, d_expected = truth(logits, label, 1.0, None, None)
    nll = cross_entropy(logits, label, grad_CV=logits)
    torch.testing.assert_close(nll, expected, **EXACT)
    torch.testing.assert_close(logits, d_expected, **EXACT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_rows_go_to_their_places_times_a_number(device, dtype, path):
    d = torch.randn(5, 1030, device=device).to(dtype)
    place = torch.tensor([6, 9, 0, 9, 3], device=device)
    factor = torch.tensor(1 / 3, dtype=torch.float64, device=device)
    with twin.forced(path):
        out = place_rows(d, place, factor, 9)
    expected = torch.zeros(9, 1030, dtype=torch.float64, device=device)
    expected[[6, 0, 3]] = d[[0, 2, 4]].double() / 3
    step = torch.finfo(dtype).eps * (1 if GPU or dtype not in DTYPES[2:] else 2)
    torch.testing.assert_close(out.double(), expected, rtol=step, atol=1e-7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"label_C": torch.zeros(3, dtype=torch.int64)},
        {"label_C": torch.zeros(2, dtype=torch.int32)},
        {"weight_C": torch.ones(3)},
        {"weight_C": torch.ones(2, dtype=torch.float64)},
        {"grad_CV": torch.ones(2, 4)},
        {"grad_CV": torch.ones(2, 5, dtype=torch.bfloat16)},
    ],
)
def test_tensors_that_do_not_fit_are_refused(wrong):
    given = {"logits_CV": torch.zeros(2, 5), "label_C": torch.zeros(2, dtype=torch.int64)} | wrong
    with pytest.raises(ValueError, match=r"rows need|the logits' form"):
        cross_entropy(**given)


def test_shapes_give_shapes():
    with torch.device("meta"):
        logits = torch.empty(4, 9, dtype=torch.bfloat16)
        nll = cross_entropy(logits, torch.empty(4, dtype=torch.int64), grad_CV=logits)
        rows = place_rows(torch.empty(3, 8), torch.empty(3, dtype=torch.int64), torch.empty(()), 7)
    assert (nll.is_meta, nll.shape, nll.dtype) == (True, (4,), torch.float32)
    assert (rows.is_meta, rows.shape) == (True, (7, 8))


# ---- the loss of models -------------------------------------------------------------------------------------


def model_of(kind: str) -> Any:
    if kind in tiny.CONFIGS:
        return tiny.build(kind)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(MORE[kind](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def some_batch(rows: int = 3, length: int = 7) -> Batch:
    ids = tiny.ids(rows=rows, length=length)
    labels = ids.clone()
    labels[:, 0] = labels[0, :4] = labels[-1, 5] = IGNORED
    token = torch.arange(ids.numel()).view(ids.shape)
    targets = int((labels != IGNORED).sum())
    return Batch(ids, labels, None, token, targets, ["x"] * rows, [(b, 0, length) for b in range(rows)])


def full(model: Any, batch: Batch) -> Tensor:
    """The plain definition on all logits."""
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(
        logits.double(), batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def gradients(loss: Tensor, tensors: list[Any]) -> list[Tensor]:
    return [torch.zeros_like(t) if g is None else g
            for t, g in zip(tensors, torch.autograd.grad(loss, tensors, allow_unused=True))]  # fmt: skip


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("kind", [*tiny.CAUSAL, *MORE])
def test_every_family_has_its_loss_and_gradients_in_chunks(kind):
    model, batch = model_of(kind).double(), some_batch()
    assert isinstance(head_of(model), Head)
    assert why_whole_logits(model) is None
    parameters = list(model.parameters())
    with torch.no_grad():
        nll, index = token_nll(model, batch)
        torch.testing.assert_close(nll, whole_nll(model, batch), **EXACT)
    assert torch.equal(index, batch.target_at)
    loss, expected = nll_sum(model, batch), full(model, batch)
    torch.testing.assert_close(loss, expected, **EXACT)
    for one, other in zip(gradients(loss / 3, parameters), gradients(expected / 3, parameters)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_and_caps_are_found_in_every_dtype(kind, dtype):
    found = head_of(model_of(kind).to(dtype))
    assert isinstance(found, Head)
    assert (found.scale, found.cap) == {
        "gemma2": (1.0, 2.0),
        "granite": (0.125, None),
        "cohere": (0.3, None),
    }[kind]


def test_a_cap_is_found_where_logits_are_small():
    """A cap of 30 does next to nothing to logits around 0."""
    shape = tf.Gemma2Config(**GEMMA)
    for cap in (30.0, None):
        shape.final_logit_softcapping = cap
        torch.manual_seed(0)
        found = head_of(tf.AutoModelForCausalLM.from_config(shape).eval())
        assert isinstance(found, Head)
        assert found.cap == cap


class Odd(nn.Module):
    """A model that does something else with its head's output, or calls it otherwise."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.out, self.kind = nn.Embedding(50, 8), nn.Linear(8, 50), kind

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        if self.kind == "normal":
            return self.out(h)
        if self.kind == "bias":
            return self.out(h) + 1.0
        if self.kind == "twice":
            return self.out(h) + self.out(h)
        if self.kind == "cut":
            return self.out(h)[..., :40]
        if self.kind == "reads":
            return F.linear(h, self.out.weight, self.out.bias)
        if self.kind == "needs":
            return self.out(h).view(*h.shape[:-1], 50)
        return self.out(h.cumsum(1).flip(1)).flip(1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("bias", "neither a scale nor a tanh"), ("twice", "once"), ("cut", "40"), ("reads", "once"),
     ("needs", "without its output layer"), ("turned", "neither")],
)  # fmt: skip
def test_models_that_do_more_with_their_head_keep_their_own_logits(kind, reason):
    torch.manual_seed(0)
    model, batch = Odd(kind).double(), some_batch()
    assert reason in (why_whole_logits(model) or "")
    logits = model(batch.ids)[:, :-1].flatten(0, 1)
    labels = batch.labels[:, 1:].flatten()
    if kind == "cut":
        labels[labels >= 40] = IGNORED
        batch = Batch(
            batch.ids, F.pad(labels.view(3, 6), (1, 0), value=IGNORED), None, batch.token, 1, ["x"], []
        )
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(nll_sum(model, batch), expected, **EXACT)
    assert isinstance(head_of(Odd("normal")), Head)


def test_models_without_a_head_and_heads_with_hooks():
    assert "names no output layer" in str(head_of(tiny.build("bert-cls")))
    assert "names no output layer" in str(head_of(nn.Linear(2, 2)))
    model = tiny.build("llama")
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert "must see whole batches" in str(head_of(model))
    handle.remove()
    assert isinstance(head_of(model), Head)


def test_a_proof_holds_for_one_output_layer():
    model = tiny.build("llama")
    first = head_of(model)
    assert head_of(model) is first
    model.lm_head = nn.Linear(16, 50)
    assert isinstance(head_of(model), Head)
    assert head_of(model) is not first
    assert head_of(model).module is model.lm_head
    assert "forward" not in model.lm_head.__dict__


# ---- what trains in the head --------------------------------------------------------------------------------


def adapted(method: str, kind: str = "llama", **settings: Any) -> tuple[Any, Adapters]:
    model = tiny.build(kind).double()
    adapters = attach(model, method, **({"r": 3} if method != "bitfit" else {}) | settings)
    for tensor in adapters.parameters():
        tensor.data = tensor.data.double()
    for adapter in adapters.adapters.values():
        for site in adapter.sites.values():
            for name, tensor in site.p.items():
                if tensor.is_floating_point() and not isinstance(tensor, nn.Parameter):
                    site.p[name] = tensor.double()
    tiny.stir(adapters)
    return model, adapters


ON_HEAD = {
    "lora": ("lora", {"target_modules": ["q", "lm_head"]}),
    "lora on the head alone": ("lora", {"target_modules": ["lm_head"]}),
    "lora with dropout": ("lora", {"target_modules": ["q", "lm_head"], "dropout": 0.4}),
    "dora": ("dora", {"target_modules": ["v", "lm_head"]}),
    "pissa": ("pissa", {"target_modules": ["lm_head"]}),
    "hira": ("hira", {"target_modules": ["v", "lm_head"]}),
    "whole": ("lora", {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
    "not on it": ("lora", {"target_modules": ["q", "v"]}),
}


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("case", ON_HEAD)
@pytest.mark.parametrize("held", [True, False], ids=["held", "free"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_what_trains_in_the_head_gets_its_gradient(case, held, kind):
    method, settings = ON_HEAD[case]
    if kind == "llama-tied" and case == "whole":
        pytest.skip("a tied head is not trained apart")
    model, adapters = adapted(method, kind, **settings)
    batch, parameters = some_batch(), adapters.parameters()
    adapters.train()
    found = []
    for loss in (nll_sum, full):
        for parameter in parameters:
            parameter.grad = None
        with adapters.batch(step=4, token_BT=batch.token):
            if held:
                with adapters.hold():
                    (loss(model, batch) / 5).backward()
            else:
                (loss(model, batch) / 5).backward()
            found.append([p.grad for p in parameters])
    assert all(g is not None for g in found[1])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("_small_chunks")
def test_each_token_of_a_mixed_batch_has_its_own_adapters_head():
    model, adapters = adapted("lora", target_modules=["q", "lm_head"], dropout=0.3)
    for name in ("b", "c"):
        settings = {"target_modules": ["lm_head", "v"], "dropout": 0.5 if name == "b" else 0.0}
        adapters.add(name, AdapterSpec(method="lora", r=2, **settings))
    for parameter in adapters.parameters():
        parameter.data = parameter.data.double()
    tiny.stir(adapters)
    batch, parameters = some_batch(4), adapters.parameters()
    adapters.train()
    found = []
    for loss in (nll_sum, full):
        with adapters.routed(["c", None, "default", "b"]), adapters.batch(step=1, token_BT=batch.token):
            with adapters.hold():
                part = loss(model, batch)
                part.backward()
            found.append([part.detach(), *(p.grad for p in parameters)])
            for parameter in parameters:
                parameter.grad = None
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_a_proof_leaves_adapters_clock_and_memory_as_they_were():
    model, adapters = adapted("lora", target_modules=["q", "lm_head"], dropout=0.3)
    adapters.train()
    model(input_ids=tiny.ids())
    before = dict(vars(adapters.flow))
    assert isinstance(head_of(model), Head)
    assert dict(vars(adapters.flow)) == before
    nll_sum(model, some_batch())
    assert adapters.flow.clock == before["clock"] + 1


def test_a_head_whose_gradient_needs_its_output():
    """tanh keeps what it gives: writing the gradient over it would be wrong."""
    model, batch = Odd("normal").double(), some_batch()
    model.out = nn.Sequential(nn.Linear(8, 50), nn.Tanh()).double()
    assert isinstance(head_of(model), Head)
    parameters = list(model.parameters())
    logits = model(batch.ids)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    for one, other in zip(gradients(nll_sum(model, batch), parameters), gradients(expected, parameters)):
        torch.testing.assert_close(one, other, **EXACT)


# ---- lengths that are fixed, chunks, waiting -----------------------------------------------------------------


def padded(batch: Batch) -> Batch:
    """Entries that count nothing fill target_at up; they point at a token without a label."""
    fill = torch.zeros(5, dtype=torch.int64)
    at = torch.cat([batch.target_at, fill])
    return Batch(batch.ids, batch.labels, None, batch.token, batch.targets, batch.rows, batch.spans, at)


@pytest.mark.parametrize("whole", [False, True])
def test_entries_without_a_label_count_nothing(whole):
    model, batch = tiny.build("llama").double(), some_batch()
    more = padded(batch)
    if whole:
        model.lm_head.register_forward_hook(lambda *_: None)
    parameters = list(model.parameters())
    losses = nll_sum(model, batch), nll_sum(model, more)
    torch.testing.assert_close(*losses, **EXACT)
    for one, other in zip(*(gradients(loss, parameters) for loss in losses)):
        torch.testing.assert_close(one, other, **EXACT)
    with torch.no_grad():
        nll, index = token_nll(model, more)
    assert len(nll) == len(index) == len(batch.target_at) + 5
    assert not nll[-5:].any()


def test_chunks_are_about_equal_and_bounded():
    assert chunks(0, 100) == []
    assert chunks(7, 64_000) == [slice(0, 7)]
    for many, row_bytes in ((8192, 2 * 32_000), (8191, 2 * 128_256), (5000, 2 * 262_144), (4097, 2 * 32_000)):
        found = chunks(many, row_bytes)
        sizes = [one.stop - one.start for one in found]
        assert sum(sizes) == many
        assert [one.start for one in found[1:]] == [one.stop for one in found[:-1]]
        assert max(sizes) <= max(1024, 2**28 // row_bytes)
        assert max(sizes) - min(sizes) <= 128 * len(sizes)


class NoWaiting(TorchDispatchMode):
    """Fails where a number of a tensor decides about what runs next: on a GPU the host would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for part in ("nonzero", "_local_scalar_dense", "masked_select", "unique", "is_nonzero"):
            assert part not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definitions index with masks, the kernels do not: the latter are left out."""
    monkeypatch.setattr(kernel, "_cross_entropy", lambda logits, label, weight, nll, *_: nll.zero_())
    monkeypatch.setattr(kernel, "_place_rows", lambda *_: None)


@pytest.mark.usefixtures("_as_on_a_gpu", "_small_chunks")
@pytest.mark.parametrize("case", ["not on it", "lora", "dora", "lora with dropout"])
def test_nothing_waits_for_the_device(case):
    method, settings = ON_HEAD[case]
    model, adapters = adapted(method, **settings)
    batch = some_batch()
    adapters.train()
    found = head_of(model)
    assert isinstance(found, Head)
    with adapters.batch(step=1, token_BT=batch.token):
        hidden = hidden_states(model, found, batch)
        with NoWaiting():
            found.nll_sum(hidden, batch).backward(inputs=[hidden, *adapters.parameters()])


def test_the_logits_of_all_rows_are_never_there(monkeypatch):
    monkeypatch.setattr(heads, "CHUNK_BYTES", 64 * 50 * 4)
    monkeypatch.setattr(heads, "LEAST_ROWS", 64)
    monkeypatch.setattr(heads, "TILE_ROWS", 64)
    model, adapters = tiny.build("llama"), None
    adapters = attach(model, r=2, target_modules=["q"])
    ids = tiny.ids(rows=32, length=17)
    batch = Batch(ids, ids.clone(), None, torch.zeros_like(ids), 512, ["x"], [(b, 0, 17) for b in range(32)])
    largest = 0

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[-1:] == (50,):
                largest = max(largest, out.numel() // 50)
            return out

    head_of(model)
    with Look():
        nll_sum(model, batch).backward()
    assert largest == 64
    assert adapters is not None


def test_hooks_do_not_see_the_proof():
    """Methods that look at data before they start hook the layers: a few tokens more would be wrong."""
    model, seen = tiny.build("llama"), []
    model.model.register_forward_hook(lambda *_: seen.append("base"))
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append("mlp"))
    model.register_forward_hook(lambda *_: seen.append("whole"))
    assert isinstance(head_of(model), Head)
    assert seen == []
    nll_sum(model, some_batch())
    assert seen == ["mlp", "base", "whole"]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.filterwarnings(
    "ignore:Attempting to run cuBLAS"
)  # torch's own, in a process' first backward pass
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    """The kernels inside a model, against float64 on the CPU; and the host never waits."""
    model = tiny.build("llama").to(dtype)
    batch, parameters = some_batch(), [model.lm_head.weight, model.model.norm.weight]
    expected = gradients(full(model.double(), batch), parameters)
    model, here = model.to("cuda", dtype), batch.to("cuda")
    for frozen in (False, True):
        model.lm_head.weight.requires_grad_(not frozen)
        found = head_of(model)
        assert isinstance(found, Head)
        hidden = hidden_states(model, found, here)
        found.nll_sum(hidden, here)  # compiled
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = found.nll_sum(hidden, here)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        wanted = parameters[1:] if frozen else parameters
        for one, other in zip(gradients(loss, wanted), expected[-len(wanted) :]):
            near_eps = 30 * torch.finfo(dtype).eps
            distance = (one.cpu().double() - other.cpu().double()).norm() / other.norm().cpu()
            assert distance < near_eps
