"""Fused decoder layers against the layers' own code: losses and gradients, tiers, switches, and what is refused.

In float64 the two differ by the models' own norms alone, which sum in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from tiny import stir
from torch import Tensor

import loraloom.model  # noqa: F401  (gives transformers the attention "loraloom")
from loraloom import fast, recompute
from loraloom.adapt import Adapters
from loraloom.adapter import AdapterSpec
from loraloom.attention import NAME
from loraloom.config import TrainConfig
from loraloom.data import Example
from loraloom.fast import FastLayer, engage
from loraloom.incoming import quantize_model
from loraloom.kernels import matmul_frozen
from loraloom.nll import nll_sum
from loraloom.optim import make_optimizer
from loraloom.packing import IGNORED, Batch, Documents, pack
from loraloom.products8 import plain_products, use_fp8
from loraloom.step import train_step

CPU = torch.device("cpu")
VOCAB = 60
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
SLIDING = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": lambda **s: tf.LlamaConfig(**SHAPE | s),
    "llama-tied": lambda **s: tf.LlamaConfig(**SHAPE | s | {"tie_word_embeddings": True}),
    "llama-bias": lambda **s: tf.LlamaConfig(**SHAPE | s, attention_bias=True, mlp_bias=True),
    "mistral": lambda **s: tf.MistralConfig(**SHAPE | s, sliding_window=5),
    "qwen2": lambda **s: tf.Qwen2Config(**SHAPE | s, **SLIDING),
    "qwen3": lambda **s: tf.Qwen3Config(**SHAPE | s, head_dim=16),
    "gemma": lambda **s: tf.GemmaConfig(**SHAPE | s, head_dim=16),
    "phi3": lambda **s: tf.Phi3Config(
        **SHAPE | s, original_max_position_embeddings=64, partial_rotary_factor=0.5
    ),
    "smollm3": lambda **s: tf.SmolLM3Config(**SHAPE | s, no_rope_layers=[1, 0]),
    "granite": lambda **s: tf.GraniteConfig(**SHAPE | s, attention_multiplier=0.3),
}
OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "gemma2": (
        lambda: tf.Gemma2Config(**SHAPE, head_dim=8),
        "other parts than a Llama layer: pre_feedforward",
    ),
    "granite-scaled": (
        lambda: tf.GraniteConfig(**SHAPE, residual_multiplier=0.5),
        "its own code gives another output",
    ),
    "olmo": (lambda: tf.OlmoConfig(**SHAPE), "OlmoLayerNorm is no RMSNorm"),
    "olmo2": (lambda: tf.Olmo2Config(**SHAPE), "other parts than a Llama layer: post_feedforward_layernorm"),
    "phi": (lambda: tf.PhiConfig(**SHAPE), "no norm of its own before the MLP"),
    "starcoder2": (lambda: tf.Starcoder2Config(**SHAPE), "Starcoder2MLP has no gate_proj and up_proj"),
    "glm": (lambda: tf.GlmConfig(**SHAPE, head_dim=8), "positions turn its heads in another way"),
    "ministral3": (lambda: tf.Ministral3Config(**SHAPE), "its own code gives another output"),
    "mixtral": (lambda: tf.MixtralConfig(**SHAPE), "MixtralSparseMoeBlock has no gate_proj and up_proj"),
    "llama-relu": (lambda: tf.LlamaConfig(**SHAPE, hidden_act="relu"), "its MLP's activation is ReLU"),
    "opt": (lambda: tf.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32), "no decoder layers of"),
    "gpt2": (lambda: tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4), "no decoder layers of"),
    "neox": (
        lambda: tf.GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
        "no decoder layers of",
    ),
}


def build(kind: str, *, dtype: torch.dtype = torch.float64, device: str = "cpu", **shape: Any) -> Any:
    """A frozen model with every parameter drawn, norms and biases too."""
    config = FAMILIES[kind](**shape) if kind in FAMILIES else OTHERS[kind][0]()
    with torch.device(device):
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    generator, scale = (
        torch.Generator().manual_seed(3),
        shape.get("hidden_size", SHAPE["hidden_size"]) ** -0.5,
    )
    with torch.no_grad():
        for parameter in model.parameters() if device == "cpu" else ():
            one = parameter.dim() == 1 and float(parameter.min()) == float(parameter.max()) == 1
            draw = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(draw + one)
    return model.to(dtype).eval().requires_grad_(False)


def adapted(model: Any, method: str = "lora", **spec: Any) -> Adapters:
    """A model's adapter in training, away from its start."""
    adapters = Adapters(model)
    adapters.add("a", AdapterSpec(**{"method": method, "r": 4, "target_modules": "all-linear"} | spec))
    adapters.adapters["a"].ready = True
    stir(adapters)
    adapters.train()
    return adapters


def examples(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(sum(lengths))
    made = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        labels = [IGNORED if at < min(2, length) else one for at, one in enumerate(ids)]
        made.append(Example(ids, labels, f"rows:{number}"))
    return made


def batches(*lengths: int, packing: bool = True, micro_tokens: int = 64, row: int | None = 32) -> list[Batch]:
    return pack(
        examples(*lengths),
        micro_tokens=micro_tokens,
        packing=packing,
        pad_id=0,
        row_length=row if packing else None,
    )


STEP = batches(11, 20, 1, 14, 1, 7)  # two rows, and documents of one token
Result = tuple[float, dict[str, Tensor]]


def result(adapters: Adapters, step: Sequence[Batch] = STEP, *, held: bool = True) -> Result:
    """The loss of a step and the gradient of every adapter tensor."""
    total = 0.0
    for parameter in adapters.parameters():
        parameter.grad = None
    with adapters.hold() if held else nothing():
        for batch in step:
            with adapters.batch(step=3, token_BT=batch.token):
                loss = nll_sum(adapters.model, batch) / sum(one.targets for one in step)
                loss.backward()
                total += float(loss.detach())
    none = torch.zeros(())
    return total, {n: none if p.grad is None else p.grad.clone() for n, p in adapters.named_parameters()}


@contextmanager
def nothing() -> Iterator[None]:
    yield


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers ran fused."""
    runs, own = [0], FastLayer.run

    def run(self: FastLayer, *args: Any) -> Tensor:
        runs[0] += 1
        return own(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FastLayer, "run", run)
        yield runs


def fused(adapters: Adapters, layers: int = 2) -> None:
    assert engage(adapters)[0] == f"fused layers: {layers} of {layers}"


def close(got: Result, wanted: Result, rel: float = 3e-6) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=rel)
    assert got[1].keys() == wanted[1].keys()
    assert any(one.any() for one in wanted[1].values())
    for name, one in wanted[1].items():
        limit = rel * float(one.abs().max())
        torch.testing.assert_close(got[1][name], one, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


def same_bits(got: Result, wanted: Result) -> None:
    assert got[0] == wanted[0]
    assert all(torch.equal(got[1][name], one) for name, one in wanted[1].items())


def compare(adapters: Adapters, step: Sequence[Batch] = STEP, rel: float = 3e-6, layers: int = 2) -> None:
    wanted = result(adapters, step)
    fused(adapters, layers)
    with pytest.MonkeyPatch.context() as patch, counted(patch) as runs:
        close(result(adapters, step), wanted, rel)
    assert runs[0] == layers * len(step)


# ---- every family, every way to adapt it ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_family_equals_its_own_code(kind: str) -> None:
    compare(adapted(build(kind)))


@pytest.mark.parametrize("kind", ["llama", "mistral", "phi3"])
@pytest.mark.parametrize(
    "step",
    [
        batches(11, 20, 7, packing=False),
        batches(9, 9, 9, 9, packing=False),
        batches(31, 13, 24, 1, 1, micro_tokens=32),
        batches(64, row=64),
    ],
    ids=["padded", "equal", "three batches", "one document"],
)
def test_batches_of_every_form(kind: str, step: list[Batch]) -> None:
    compare(adapted(build(kind)), step)


SPECS: dict[str, dict[str, Any]] = {
    "q and v": {"target_modules": ["q", "v"]},
    "o alone": {"target_modules": ["o"]},
    "mlp": {"target_modules": ["mlp"]},
    "up alone": {"target_modules": ["up_proj"]},
    "r=16": {"r": 16},
    "r=70": {"r": 70, "alpha": 10.0},
    "ranks apart": {"rank_pattern": {"q_proj": 1, "k_proj": 0, "down_proj": 20, "layers.1.mlp.up_proj": 64}},
    "alpha": {"alpha": 3.0, "alpha_pattern": {"v_proj": 20.0}},
    "dropout": {"dropout": 0.4},
    "dropout of some": {"dropout": 0.4, "target_modules": ["v", "gate_proj"], "r": 70},
    "the lowest layer": {"layers": "0"},
    "the highest layer": {"layers": "1"},
    "the head too": {"target_modules": ["q", "down", "lm_head"]},
    "rslora": {"method": "rslora"},
    "loraplus": {"method": "loraplus"},
    "lorafa": {"method": "lorafa"},
    "pissa": {"method": "pissa", "r": 3},
    "adalora": {"method": "adalora"},
    "deltalora": {"method": "deltalora"},
    "head saved": {"target_modules": ["q"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", SPECS)
def test_each_adapter_equals_its_own_code(name: str) -> None:
    compare(adapted(build("llama"), **SPECS[name]))


@pytest.mark.parametrize("kind", ["phi3", "qwen2", "llama-tied"])
def test_adapters_on_one_projection_or_beside_biases(kind: str) -> None:
    names = {"phi3": ["qkv_proj", "down_proj"], "qwen2": ["k"], "llama-tied": ["o", "embed_tokens"]}
    compare(adapted(build(kind), target_modules=names[kind], dropout=0.2))


KEPT_APART: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"method": "dora"}, "DoRA scales the whole output"),
    "vera": ({"method": "vera"}, "VeRA shares its matrices among layers"),
    "hira": ({"method": "hira"}, "HiRA is no low-rank pair"),
    "adapterh": ({"method": "adapterh", "target_modules": "auto"}, "no low-rank pair"),
    "adapterl": ({"method": "adapterl", "target_modules": "auto"}, "a method works on the layer as a whole"),
    "alora": ({"method": "alora", "options": {"invocation": [5]}}, "ALoRA chooses among tokens"),
    "bias": ({"bias": "all"}, "biases or modules of the layer are trained"),
    "saved": ({"target_modules": ["q"], "modules_to_save": ["mlp"]}, "biases or modules of the layer"),
}


@pytest.mark.parametrize("name", KEPT_APART)
def test_what_is_no_pair_keeps_its_own_code_and_says_why(name: str) -> None:
    spec, why = KEPT_APART[name]
    adapters = adapted(build("llama-bias"), **spec)
    wanted = result(adapters)
    lines = engage(adapters)
    assert lines[0] == "fused layers: 0 of 2"
    assert len(lines) == 2
    assert lines[1].startswith("2 with their own code: ")
    assert why in lines[1]
    same_bits(result(adapters), wanted)


def test_rows_of_one_projection_that_are_adapted_apart_keep_their_own_code() -> None:
    adapters = adapted(build("phi3"), target_modules=["q", "v"])
    assert "adapted apart" in engage(adapters)[1]


@pytest.mark.parametrize("name", ["dora", "adapterh", "bias", "saved"])
def test_an_adapter_that_takes_the_name_of_another_is_looked_at_anew(name: str) -> None:
    adapters = adapted(build("llama-bias"))
    fused(adapters)
    result(adapters)
    adapters.remove("a")
    adapters.add("a", AdapterSpec(**{"r": 4, "target_modules": "all-linear"} | KEPT_APART[name][0]))
    stir(adapters)
    got = result(adapters)
    adapters.unfuse()
    close(got, result(adapters))


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_keep_their_own_code_and_say_why(kind: str) -> None:
    lines = engage(adapted(build(kind, dtype=torch.float32)))
    assert OTHERS[kind][1] in " ".join(lines)
    assert lines[0].startswith("fused layers: none") or lines[0] == "fused layers: 0 of 2"


@pytest.mark.parametrize(
    "kind", [*FAMILIES, *(k for k in OTHERS if k not in ("granite-scaled", "ministral3"))]
)
def test_shapes_alone_say_the_same(kind: str) -> None:
    """As the memory is predicted, and as `doctor` shows a model."""
    lines = []
    for device in ("cpu", "meta"):
        model = build(kind, dtype=torch.float32, device=device)
        with torch.device(device):
            adapters = Adapters(model)
            adapters.add("a", AdapterSpec(r=4, target_modules="all-linear"))
        lines.append(engage(adapters))
    assert lines[0] == lines[1]


def test_a_window_that_the_layer_does_not_name_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted(build("mistral"))
    monkeypatch.setattr(fast, "window_of", lambda attn: None)
    assert "window" in engage(adapters)[1]


# ---- bases ------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 64, "intermediate_size": 96}  # multiples of 16


def distance(got: Result, wanted: Result) -> float:
    """Of all gradients together, relative."""
    x, y = (torch.cat([one.double().flatten() for one in each[1].values()]) for each in (got, wanted))
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("table", ["nf4", "fp8"])
@pytest.mark.parametrize("kind", ["qwen2", "phi3"])
def test_quantised_bases(table: str, kind: str, dtype: torch.dtype) -> None:
    model = quantize_model(build(kind, dtype=dtype, **WIDE), table)
    compare(adapted(model), rel=3e-5 if dtype == torch.float32 else 3e-6)


@pytest.mark.parametrize("r", [4, 70])
@pytest.mark.parametrize("table", ["nf4", "fp8"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_products_in_8_bits(kind: str, table: str, r: int) -> None:
    model = quantize_model(build(kind, dtype=torch.float32, **WIDE), table)
    adapters = adapted(model, r=r)
    exact = result(adapters)
    assert not use_fp8(model, True, CPU)
    wanted = result(adapters)
    fused(adapters)
    with plain_products(model):
        close(result(adapters), exact, rel=3e-5)
    got = result(adapters)
    assert got[0] == pytest.approx(wanted[0], rel=1e-3)
    assert (
        distance(got, wanted) < 0.06
    )  # gradients are rounded by scales of their own: of q, k and v together
    assert distance(got, exact) < 1.2 * distance(wanted, exact)
    assert distance(got, exact) > 0.01


def test_a_proof_without_8_bits_leaves_no_room_of_16_behind() -> None:
    model = quantize_model(build("llama", dtype=torch.float32, **WIDE), "nf4")
    adapters = adapted(model)
    use_fp8(model, True, CPU)
    with plain_products(model):
        result(adapters)
        assert torch.float32 in {dtype for _, dtype, _ in matmul_frozen._buffers}
    assert not matmul_frozen._buffers
    result(adapters)
    assert {dtype for _, dtype, _ in matmul_frozen._buffers} == {torch.float8_e4m3fn}


def test_one_of_three_that_is_not_multiplied_in_8_bits() -> None:
    model = quantize_model(build("llama", dtype=torch.float32, **WIDE), "fp8")
    adapters = adapted(model)
    exact = result(adapters)
    use_fp8(model, True, CPU)
    for layer in model.model.layers:
        weight: Any = layer.self_attn.k_proj.weight
        weight.codes = weight.codes.without_channels()
    wanted = result(adapters)
    fused(adapters)
    got = result(adapters)
    assert 0.01 < distance(got, exact) < distance(wanted, exact)


def test_in_bfloat16_it_rounds_no_worse_than_its_own_code() -> None:
    """Each gradient's distance from float64 autograd on the same numbers, at most twice the own code's."""
    base = build("llama", dtype=torch.bfloat16, **WIDE)
    truth = result(adapted(copy.deepcopy(base).double()))
    adapters = adapted(base)
    own = result(adapters)
    fused(adapters)
    got = result(adapters)
    for name, exact in truth[1].items():
        far, farther = (float((one[1][name].double() - exact).norm() / exact.norm()) for one in (got, own))
        assert far < 2 * farther, name
        assert far < 0.1, name


@pytest.mark.parametrize("odd", ["zeros", "outliers"])
def test_rows_that_8_bits_find_hard(odd: str) -> None:
    """A token of zeros, and one whose every feature is 1,000 times its neighbours'."""
    model = build("llama", dtype=torch.float32, **WIDE)
    with torch.no_grad():
        model.model.embed_tokens.weight[7:9] *= 0.0 if odd == "zeros" else 1e3
        model.model.embed_tokens.weight[9, 0] = 1e4
    adapters = adapted(quantize_model(model, "fp8"))
    step = batches(12, 20)
    for batch in step:
        batch.ids[:, 3:6] = torch.tensor([7, 8, 9])
    exact = result(adapters, step)
    use_fp8(model, True, CPU)
    wanted = result(adapters, step)
    fused(adapters)
    got = result(adapters, step)
    assert all(bool(one.isfinite().all()) for one in got[1].values())
    assert got[0] == pytest.approx(exact[0], rel=0.05)
    assert distance(got, exact) < 1.2 * distance(wanted, exact)
    assert distance(got, exact) < 0.2


# ---- tiers, passes and steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [False, True])
def test_tiers_give_the_same_bits(quantize: bool) -> None:
    model = build("llama", dtype=torch.float32, **WIDE)
    if quantize:
        use_fp8(quantize_model(model, "fp8"), True, CPU)
    adapters = adapted(model, dropout=0.3)
    fused(adapters)
    wanted = result(adapters)
    for tier in ("gate_up", "full", "offload", "none"):
        recompute.apply(model, adapters, tier)
        same_bits(result(adapters), wanted)


@pytest.mark.parametrize("method", ["lora", "adalora", "deltalora"])
def test_held_or_not_and_split_or_not(method: str) -> None:
    adapters = adapted(build("llama"), method, dropout=0.0 if method == "deltalora" else 0.3)
    fused(adapters)
    whole = result(adapters)
    close(result(adapters, held=False), whole, rel=2e-6)  # sums of float32 gradients, in another order
    close(result(adapters, batches(11, 20, 1, 14, 1, 7, micro_tokens=32)), whole, rel=2e-6)
    close(result(adapters, batches(11, 20, 1, 14, 1, 7, packing=False)), whole, rel=2e-6)


def test_two_steps_of_training_end_at_the_same_weights() -> None:
    left = []
    for fuse in (False, True):
        adapters = adapted(build("qwen3"), "adalora")
        if fuse:
            fused(adapters)
        settings = TrainConfig(optimizer="sgd", momentum=0.0, weight_decay=0.0)
        optimizer = make_optimizer(adapters.groups(0.1), settings)
        for step in range(2):
            train_step(adapters.model, adapters, optimizer, STEP, step=step, num_steps=10, max_norm=1.0)
        left.append({name: p.detach() for name, p in adapters.named_parameters()})
    for name, wanted in left[0].items():
        torch.testing.assert_close(left[1][name], wanted, rtol=1e-4, atol=1e-6)


def test_dropout_is_that_of_the_forward_pass_however_late_the_backward_comes() -> None:
    adapters = adapted(build("llama"), dropout=0.4)

    def late() -> Result:
        losses = []
        for number, batch in enumerate((STEP[0], batches(9, 9)[0])):
            with adapters.batch(step=number, token_BT=batch.token):
                losses.append(nll_sum(adapters.model, batch))
        adapters.eval()
        for parameter in adapters.parameters():
            parameter.grad = None
        (losses[0] + losses[1]).backward()
        adapters.train()
        grads = {n: p.grad.clone() for n, p in adapters.named_parameters() if p.grad is not None}
        return float((losses[0] + losses[1]).detach()), grads

    wanted = late()
    fused(adapters)
    close(late(), wanted)


def test_training_and_evaluation_inside_of_one_hold() -> None:
    adapters = adapted(build("llama"), dropout=0.4)
    fused(adapters)
    batch = STEP[0]

    @torch.no_grad()
    def nats() -> float:
        with adapters.batch(step=3, token_BT=batch.token):
            return float(nll_sum(adapters.model, batch))

    training = nats()
    adapters.eval()
    evaluation = nats()
    assert training != evaluation
    with adapters.hold():
        assert nats() == pytest.approx(evaluation, rel=1e-12)
        adapters.train()
        assert nats() == pytest.approx(training, rel=1e-12)
        adapters.eval()
        assert nats() == pytest.approx(evaluation, rel=1e-12)


def test_evaluation_the_base_and_routed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted(build("llama"))
    adapters.add("b", AdapterSpec(r=3, target_modules=["q", "down"]))
    stir(adapters, "b", seed=4)
    adapters.use("a")
    adapters.eval()
    (batch,) = batches(9, 14, 12, packing=False)

    @torch.no_grad()
    def all_ways() -> list[float]:
        found = [float(nll_sum(adapters.model, batch))]
        with adapters.disabled():
            found.append(float(nll_sum(adapters.model, batch)))
        with adapters.routed(["a", None, "b"]):
            found.append(float(nll_sum(adapters.model, batch)))
        for names in (("b",), ("a", "b"), ("a",)):
            adapters.use(*names)
            found.append(float(nll_sum(adapters.model, batch)))
        return found

    wanted = all_ways()
    assert len(set(wanted)) == len(wanted) - 1  # the first is the last
    fused(adapters)
    with counted(monkeypatch) as runs:
        assert all_ways() == pytest.approx(wanted, rel=1e-6)
    assert runs[0] == 2 * 4  # all but the routed rows, and two adapters at once
    adapters.use("a", "b")
    assert engage(adapters)[1] == "2 with their own code: several adapters are in use"


def test_generation_with_a_cache_is_its_own_codes() -> None:
    adapters = adapted(build("mistral", dtype=torch.float32))
    adapters.eval()
    ids = torch.arange(4, 12)[None]
    about: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    wanted = adapters.model.generate(ids, **about)
    logits = adapters.model(ids).logits
    fused(adapters)
    assert torch.equal(adapters.model.generate(ids, **about), wanted)
    assert torch.equal(adapters.model(ids).logits, logits)


def test_what_it_does_not_do_goes_to_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted(build("llama", dtype=torch.float32))
    fused(adapters)
    layers: Any = adapters.model.get_submodule("model.layers")
    seen: list[int] = []
    with counted(monkeypatch) as runs:
        with torch.autocast("cpu", torch.bfloat16):
            result(adapters, held=False)
        assert runs[0] == 0
        hook = layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
        result(adapters)
        assert (len(seen), runs[0]) == (1, 1)
        hook.remove()
        adapters.model.double()
        result(adapters)
        adapters.model.float()  # weights are no views of the joined ones any more
        result(adapters)
        assert runs[0] == 1
        fused(adapters)
        result(adapters)
        assert runs[0] > 1


def test_a_second_backward_pass_is_refused() -> None:
    adapters = adapted(build("llama"))
    fused(adapters)
    loss = nll_sum(adapters.model, STEP[0])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


# ---- giving everything back -------------------------------------------------------------------------------------


def state(model: Any) -> dict[str, tuple[Any, ...]]:
    """Every parameter: the object, its bits, its layout, and what holds its memory."""
    found = {}
    for name, parameter in model.named_parameters():
        codes = getattr(parameter, "codes", None)
        parts = [parameter.detach()] if codes is None else list(codes.tensors())
        assert all(part.is_contiguous() for part in parts)
        bits = [part.clone().view(torch.uint8) if part.dim() else part.clone() for part in parts]
        rooms = [part.untyped_storage().nbytes() for part in parts]
        found[name] = (parameter, bits, rooms)
    return found


def unchanged(model: Any, before: dict[str, tuple[Any, ...]], *, rooms: bool = True) -> None:
    after = state(model)
    assert after.keys() == before.keys()
    for name, (parameter, bits, held) in before.items():
        now = after[name]
        assert now[0] is parameter, name
        assert all(torch.equal(x, y) for x, y in zip(now[1], bits, strict=True)), name
        assert not rooms or now[2] == held, name


def base(form: str) -> Any:
    model = build("llama", dtype=torch.float32, **WIDE)
    if form != "dense":
        quantize_model(model, form.removesuffix(" x 8"))
        if form.endswith("x 8"):
            use_fp8(model, True, CPU)
    return model


@pytest.mark.parametrize("form", ["dense", "nf4", "fp8", "nf4 x 8", "fp8 x 8"])
def test_detaching_gives_every_bit_back(form: str) -> None:
    model = base(form)
    before = state(model)
    logits = model(torch.arange(4, 20)[None]).logits
    adapters = adapted(model)
    fused(adapters)
    if not form.endswith("8"):
        unchanged(model, before, rooms=False)
    result(adapters)
    adapters.detach()
    unchanged(model, before)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(model(torch.arange(4, 20)[None]).logits, logits)


@pytest.mark.parametrize("order", ["unfuse, unmerge", "unmerge, unfuse", "detach"])
@pytest.mark.parametrize("form", ["dense", "fp8 x 8"])
def test_merging_a_fused_model(form: str, order: str) -> None:
    model = base(form)
    before = state(model)
    adapters = adapted(model, target_modules=["q", "gate_proj", "down"])
    adapters.eval()

    @torch.no_grad()
    def nats() -> float:
        return float(nll_sum(model, STEP[0]))

    apart = nats()
    fused(adapters)
    adapters.merge()
    merged = nats()
    assert merged == pytest.approx(apart, rel=1e-4 if form == "dense" else 2e-2)
    if order.startswith("unfuse"):
        adapters.unfuse()
        assert nats() == merged
    for verb in order.split(", "):
        getattr(adapters, verb)()
    if order != "detach":
        assert nats() == apart
        adapters.detach()
    unchanged(model, before)


@pytest.mark.parametrize("tier", ["full", "offload"])
@pytest.mark.parametrize("first", ["tier", "fusing"])
def test_layers_are_released_under_a_tier_too(tier: str, first: str) -> None:
    model = base("dense")
    before = state(model)
    adapters = adapted(model)
    wanted = result(adapters)
    fused(adapters)
    recompute.apply(model, adapters, tier)
    if first == "tier":
        recompute.apply(model, adapters, "none")
    adapters.unfuse()
    same_bits(result(adapters), wanted)
    adapters.detach()
    unchanged(model, before)
    recompute.apply(model, adapters, "none")
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_released_layer_is_its_own_code_wherever_it_is_still_held() -> None:
    adapters = adapted(build("llama", dtype=torch.float32))
    fused(adapters)
    adapters.add("block", AdapterSpec(method="adapterl"))  # stands around the fused layers
    adapters.use("a")
    adapters.unfuse()
    with pytest.MonkeyPatch.context() as patch, counted(patch) as runs:
        result(adapters)
    assert runs[0] == 0


def test_fusing_twice_and_a_forward_that_somebody_else_put_there() -> None:
    model = build("llama")
    adapters = adapted(model)
    fused(adapters)
    fused(adapters)
    assert len(adapters.fast) == 2
    adapters.unfuse()
    layer = model.model.layers[1]
    layer.forward = type(layer).forward.__get__(layer)
    assert engage(adapters) == [
        "fused layers: 1 of 2",
        "1 with their own code: the layer's forward was replaced",
    ]
    del layer.__dict__["forward"]
    adapters.detach()
    layer.mlp.up_proj.forward = torch.nn.Linear.forward.__get__(layer.mlp.up_proj)
    adapters = adapted(model, target_modules=["q"])
    assert "the forward of gate_proj/up_proj was replaced" in engage(adapters)[1]
    model.set_attn_implementation("sdpa")
    assert engage(adapters)[1] == "2 with their own code: model.attention is not varlen"


# ---- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["none", "gate_up"])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_what_a_layer_keeps_for_the_backward_pass(kind: str, tier: str) -> None:
    """Bytes a token in 16 bits: 2 (2h + q + (q + 2k) + 2f) + 4 heads, the thin products, and two rstd."""
    h, f, heads, groups, dim, tokens = 256, 688, 8, 4, 32, 512
    shape = {
        "hidden_size": h,
        "intermediate_size": f,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": tokens,
        "num_hidden_layers": 1,
    }
    model = build(kind, dtype=torch.bfloat16, device="meta", **shape)
    with torch.device("meta"):
        adapters = Adapters(model)
        adapters.add("a", AdapterSpec(r=16, target_modules="all-linear"))
    lines = engage(adapters, recompute=tier)
    assert lines[0] == "fused layers: 1 of 1"
    layer = adapters.fast[0]
    documents = Documents(torch.empty(5, dtype=torch.int32, device="meta"), (tokens // 4,) * 4)
    x = torch.empty(tokens, h, dtype=torch.bfloat16, device="meta", requires_grad=True) * 1
    cos, sin = (torch.empty(tokens, dim, dtype=torch.bfloat16, device="meta") for _ in range(2))
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(one: Tensor) -> Tensor:
        if isinstance(one, Tensor) and not isinstance(one, torch.nn.Parameter):
            kept[one.untyped_storage()._cdata] = one.untyped_storage()
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        out = layer.run(x, cos, sin, documents)
    out.sum().backward()
    shared = {one.untyped_storage()._cdata for one in (cos, sin, documents.starts)}
    numbytes = sum(one.nbytes() for key, one in kept.items() if key not in shared)
    q, k, wide = heads * dim, groups * dim, 2 * f if tier == "none" else 0
    thin = 2 * ((16 if kind == "phi3" else 64) + 16 + (16 if kind == "phi3" else 32) + 16)
    wanted = 2 * (2 * h + q + (q + 2 * k) + wide) + 4 * heads + thin + 2 * 4
    assert numbytes / tokens == pytest.approx(wanted, rel=0.005)
