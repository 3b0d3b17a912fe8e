"""8-bit floats: rows, products and weights against e4m3 rounded by hand, products in float64, transformers' own model.

Without a GPU the kernels run under Triton's interpreter, which cannot round to fp8: there the numbers before that
rounding are compared, and products are the definition's.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from model_folders import tokenizer
from torch import Tensor, nn

from loraloom import api
from loraloom.adapt import attach
from loraloom.config import ModelConfig
from loraloom.errors import UserError
from loraloom.incoming import quantize_model
from loraloom.kernels import fp8, twin
from loraloom.kernels.fp8 import Rows8, fp8_reason, matmul8, quantize_rows, turn8, width_reason
from loraloom.kernels.matmul_frozen import release_buffers
from loraloom.layers import is_linear
from loraloom.model import Loaded, load_model
from loraloom.products8 import LOST, use_fp8
from loraloom.quant import Weight4, dense, encode, pieces, quantized
from loraloom.weights8 import Codes8, encode8

GPU = torch.cuda.is_available()
E4M3 = torch.float8_e4m3fn
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def device() -> torch.device:
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    pytest.importorskip("triton")
    return torch.device("cuda" if GPU else "cpu")


def random(*shape: int, seed: int = 0, device: Any = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def by_hand(x: Tensor) -> Tensor:
    """e4m3 in numpy: 3 bits after the point, the least exponent -6, ties to even, nothing above 448."""
    v = x.double().numpy()
    exponent = np.maximum(np.frexp(np.abs(v))[1] - 1, -6)
    step = 2.0 ** (exponent - 3.0)
    return torch.from_numpy(np.clip(np.round(v / step) * step, -448, 448)).float()  # numpy's ties go to even


# ---- rows ---------------------------------------------------------------------------------------------------


def activations(tokens: int = 40, width: int = 96) -> Tensor:
    """With a row of zeros, one of next to nothing, an outlier channel, and a token that is all outlier."""
    x = random(max(tokens, 4), width)
    x[:, 5] *= 200.0
    x[1], x[2], x[3] = 0.0, x[2].sign() * 1e-36, x[3] * 3e4
    return x[:tokens]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_as_by_hand(dtype: Any) -> None:
    x = activations().to(dtype) if dtype != torch.float16 else activations().clamp(-6e4, 6e4).half()
    rows = quantize_rows(x)
    assert (rows.codes.dtype, rows.scale.dtype) == (E4M3, torch.float32)
    amax = x.float().abs().amax(1)
    assert torch.equal(rows.scale, torch.where(amax / 448 < 1e-38, 1.0, amax / 448))
    assert torch.equal(rows.codes.float(), by_hand(x.float() * (1 / rows.scale)[:, None]))
    assert not rows.codes[1:3].float().any()
    near = rows.dense().double()
    worst = torch.maximum(x.double().abs() / 16, rows.scale.double()[:, None] * 2.0**-10)
    assert ((near - x.double()).abs() <= worst * (1 + 1e-6)).all()


def test_powers_of_two_keep_the_codes_exact() -> None:
    rows = quantize_rows(activations(), power=True)
    mantissa, _ = torch.frexp(rows.scale)
    assert (mantissa == 0.5).all()
    tops = rows.codes.float().abs().amax(1)
    assert (((tops >= 224) & (tops <= 448)) | (tops == 0)).all()


def test_one_token_and_none_and_what_is_no_matrix() -> None:
    x = random(1, 32)
    assert torch.equal(quantize_rows(x).codes.float()[0], by_hand(x * 448 / x.abs().max())[0])
    assert quantize_rows(x[:0]).codes.shape == (0, 32)
    for wrong in (x[0], x.int(), torch.empty(2, fp8.WIDEST + 1, device="meta")):
        with pytest.raises(ValueError, match="rows of 1 to"):
            quantize_rows(wrong)


def test_what_is_not_finite_stays_so() -> None:
    x = random(3, 16)
    x[1, 4] = math.nan
    codes = quantize_rows(x).codes.float()
    assert codes[1].isnan().any()
    assert codes[[0, 2]].isfinite().all()


@pytest.mark.parametrize("power", [False, True])
def test_the_kernel_of_rows_equals_the_definition(device: torch.device, power: bool) -> None:
    wide = activations(9, 260).to(device)
    for x in (
        wide,
        wide[:, 3:100],
        wide.T,
        wide[1:2],
        wide.bfloat16(),
        wide[:, :1],
        wide[::2, ::3].bfloat16(),
    ):
        found = []
        for path in ("torch", "triton"):
            codes = torch.full(x.shape, math.nan, device=device)
            scale = torch.full((len(x),), math.nan, device=device)
            with twin.forced(path):
                fp8._quantize_rows(x, codes, scale, power=power)
                if GPU:
                    codes = quantize_rows(x, power=power).codes.float()
            found.append((codes, scale))
        for definition, kernel in zip(*found):
            assert torch.equal(definition, kernel), (tuple(x.shape), x.dtype)


# ---- products -----------------------------------------------------------------------------------------------


def weight(o: int = 64, i: int = 96, device: Any = "cpu") -> Codes8:
    return encode8(random(o, i, seed=1, device=device) * 0.02).with_channels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_product_is_that_of_the_numbers(device: torch.device, dtype: Any, tokens: int) -> None:
    rows, codes = quantize_rows(activations(tokens).to(device)), weight(device=device)
    exact = rows.dense(torch.float64) @ codes.decode(torch.float64).T
    out = torch.full((tokens, 64), math.nan, dtype=dtype, device=device)
    for y in (
        matmul8(rows, codes.codes, codes.scale, dtype),
        matmul8(rows, codes.codes, codes.scale, dtype, out),
    ):
        assert y.dtype == dtype
        size = (rows.dense(torch.float64).abs() @ codes.decode(torch.float64).abs().T).clamp(min=1e-30)
        # fast accumulation cuts each of its few rounds off at 13 bits behind their largest term; 0.0008 was seen
        limit = 2.0**-9 if GPU else 2.0**-22
        limit += 2.0**-8 if dtype == torch.bfloat16 else 0.0
        assert ((y.double() - exact).abs() / size).max() <= limit
    assert y.data_ptr() == out.data_ptr()
    assert matmul8(Rows8(rows.codes[:0], rows.scale[:0]), codes.codes, codes.scale, dtype).shape == (0, 64)


def test_operands_that_do_not_fit() -> None:
    rows, codes = quantize_rows(activations()), weight()
    for x, w8, scale in (
        (rows, codes.codes[:, :32], codes.scale),
        (rows, codes.codes.T, codes.scale),
        (rows, codes.codes, codes.scale[:3]),
        (rows, codes.codes, codes.scale.double()),
        (Rows8(rows.codes.float(), rows.scale), codes.codes, codes.scale),
    ):
        with pytest.raises(ValueError, match="have no product in 8 bits"):
            matmul8(x, w8, scale, torch.float32)
    for out in (torch.empty(40, 64).bfloat16(), torch.empty(64, 40).T, torch.empty(64, 40)):
        with pytest.raises(ValueError, match="`out` must be contiguous"):
            matmul8(rows, codes.codes, codes.scale, torch.float32, out)
    assert width_reason(64, 4096) is None
    assert width_reason(64, 40) == "40 is no multiple of 16"


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_widths_that_a_gpu_does_not_take() -> None:
    codes = weight(40, 96, device="cuda")
    with pytest.raises(ValueError, match="40 is no multiple of 16"):
        matmul8(quantize_rows(activations().cuda()), codes.codes, codes.scale, torch.bfloat16)


def test_devices_say_why_not() -> None:
    assert "CPU" in str(fp8_reason(CPU))
    assert "NVIDIA" in str(fp8_reason(torch.device("mps")))
    if GPU:
        able = torch.cuda.get_device_capability() >= (8, 9)
        assert (fp8_reason(torch.device("cuda")) is None) == able


# ---- weights ------------------------------------------------------------------------------------------------


def test_a_weight_in_8_bits_is_rounded_as_by_hand() -> None:
    w = random(48, 80) * 0.02
    w[7], w[9, 3] = 0.0, 3.0
    codes = encode8(w)
    assert torch.equal(codes.codes.float(), by_hand(w / codes.scale[:, None]))
    back = codes.decode(torch.float32)
    assert torch.equal(back, codes.codes.float() * codes.scale[:, None])
    off = (back - w)[w != 0] / w[w != 0]
    plain = (
        torch.arange(48)[:, None].expand_as(w)[w != 0] != 9
    )  # a row with an outlier keeps small ones coarsely
    assert off[plain].square().mean().sqrt().item() == pytest.approx(0.0265, abs=0.002)
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(codes.decode(dtype), back.to(dtype)), "four bits and a power of two"
    held = torch.full((48 * 80 + 7,), math.nan, dtype=torch.bfloat16)
    assert codes.decode(torch.bfloat16, held).data_ptr() == held.data_ptr()
    assert torch.equal(codes.lines(5, 11, torch.float32), back[5:11])
    with pytest.raises(ValueError, match="2 of 3,840 weights are not finite"):
        encode8(w.index_put((torch.tensor([1, 2]), torch.tensor([3, 4])), torch.tensor(math.inf)))


def test_the_transpose_holds_the_same_numbers(device: torch.device) -> None:
    """All but those that underflow in the coarser of the two; the kernel turns as the definition does."""
    w = random(70, 100) * 0.02
    w[:, 3] *= 900.0
    w[11] *= 1e-3
    codes = encode8(w.to(device)).with_channels()
    straight, rows = codes.eight(False)
    assert straight.data_ptr() == codes.codes.data_ptr()
    assert rows is codes.scale
    found = []
    for path in ("torch", "triton"):
        release_buffers()
        turned = torch.full((100, 70), math.nan, device=device)
        with twin.forced(path):
            fp8._turn8(codes.codes, codes.scale, codes.columns, turned)
            if GPU:
                turned = codes.eight(True)[0].float()
        found.append(turned)
    assert torch.equal(*found)
    back = (by_hand(found[0].cpu()) * codes.columns.cpu()[:, None]).T
    plain = dense_of(codes)
    small = plain.abs() < 2.0**-6 * torch.maximum(codes.scale[:, None], codes.columns).cpu()
    assert torch.equal(back[~small], plain[~small])
    assert 0 < (small & (plain != 0)).float().mean() < 0.1
    wide = torch.zeros(100, 200, dtype=E4M3, device=device)
    part = turn8(codes.codes, codes.scale, codes.columns, wide[:, 16:86])
    assert part.data_ptr() == wide[:, 16:].data_ptr()
    assert torch.equal(part.float(), codes.eight(True)[0].float())
    assert not wide[:, :16].float().any()
    assert not wide[:, 86:].float().any()
    for wrong in (wide, wide.view(-1)[:6999], torch.empty(100, 70, device=device)):
        with pytest.raises(ValueError, match="has no room"):
            turn8(codes.codes, codes.scale, codes.columns, wrong)


def dense_of(codes: Codes8) -> Tensor:
    return codes.decode(torch.float32).cpu()


@pytest.mark.parametrize("table", ["nf4", "fp8"])
def test_what_a_coded_weight_can_do(table: str) -> None:
    w = quantized(random(32, 48), table=table).data
    assert isinstance(w, Weight4)
    assert not w.fp8
    w.codes = w.codes.with_channels()
    whole, parts = dense(w), torch.zeros(32, 48)
    for rows, columns, part in pieces(w, torch.float32):
        parts[rows, columns] = part
    assert torch.equal(parts, whole)
    for other in (
        w.detach(),
        w.T,
        w.clone(),
        w.to("cpu", torch.bfloat16),
        nn.Parameter(w, requires_grad=False),
    ):
        assert other.fp8, "channels go with the codes"
        assert torch.equal(dense(other, torch.float32), whole.T if other.flipped else whole)
    assert w.to("meta").fp8
    assert w.codes.without_channels().multiplies8 is False
    with pytest.raises(ValueError, match="are not there"):
        w.codes.without_channels().eight(True)
    experts = encode(random(3, 32, 48), table=table).with_channels()
    assert (experts.experts, experts.shape) == (3, (32, 48))
    one = experts.expert(1)
    for turned in (False, True):
        mine, scale = one.eight(turned)
        theirs, wanted = (
            encode(random(3, 32, 48)[1], table=table)
            .with_channels()
            .eight(turned, torch.empty(1536, dtype=E4M3))
        )
        assert torch.equal(mine.float(), theirs.float())
        assert torch.equal(scale, wanted)


@pytest.mark.parametrize("table", ["nf4", "fp8"])
@pytest.mark.parametrize("flipped", [False, True])
def test_products_in_8_bits_are_close_to_those_in_16_both_ways(table: str, flipped: bool) -> None:
    """Rounding to three bits after the point is 2.65 % rms of each factor, forward and backward."""
    torch.manual_seed(0)
    w = quantized(random(192, 256, seed=9) * 0.02, table=table, flipped=flipped).data
    inputs, outputs = (192, 256) if flipped else (256, 192)
    if flipped:
        w = w.T  # Conv1D's way: a tensor (I, O) that stands for the transpose of what is coded
        inputs, outputs = w.shape[1], w.shape[0]
    x, seed = torch.randn(3, 17, inputs, requires_grad=True), torch.randn(3, 17, outputs)
    seed[1, 4] *= 1e4
    bias = torch.randn(outputs, requires_grad=True)
    y = nn.functional.linear(x, w, bias)
    (dx, db) = torch.autograd.grad(y, [x, bias], seed)
    w.codes = w.codes.with_channels()
    y8 = nn.functional.linear(x, w, bias)
    (dx8, db8) = torch.autograd.grad(y8, [x, bias], seed)
    assert torch.equal(db, db8)
    expected = 0.0265 * (2**0.5 if table == "nf4" else 1)  # a weight in fp8 is exact
    for near, exact in ((y8 - bias, y - bias), (dx8, dx)):
        off = (near - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert off.mean().item() == pytest.approx(expected, rel=0.15)
        assert off.max() < 1.5 * expected
        assert torch.cosine_similarity(near.flatten(), exact.flatten(), dim=0) > 0.999


# ---- models -------------------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
MLP = {"intermediate_size": 128, "num_key_value_heads": 2}
MODELS = {
    "llama": lambda: tf.LlamaConfig(**SHAPE, **MLP),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "mixtral": lambda: tf.MixtralConfig(**SHAPE, **MLP, num_local_experts=4, num_experts_per_tok=2),
}
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))


def written(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    model: Any = tf.AutoModelForCausalLM.from_config(MODELS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.dim() == 1))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, **changes: Any) -> Loaded:
    chosen = {"dtype": "float32", "device": "cpu", "quantize": "fp8"} | changes
    return load_model(ModelConfig(id=str(folder), **chosen), offline=True, progress=False)


def rounded(w: Tensor) -> Tensor:
    """What e4m3 with a power of two for each row makes of a matrix."""
    scale = 2.0 ** torch.ceil(torch.log2(w.double().abs().amax(1, keepdim=True) / 448))
    return (by_hand(w.double() / scale).double() * scale).float()


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("base") / request.param, request.param)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_logits_are_those_of_transformers_with_rounded_weights(folder: Path) -> None:
    model: Any = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        for name, module in model.named_modules():
            if is_linear(module) and module is not head:
                turned = type(module).__name__ == "Conv1D"
                module.weight.copy_(rounded(module.weight.T).T if turned else rounded(module.weight))
            if name.endswith(".experts"):
                for w in module.parameters():
                    for one in w:
                        one.copy_(rounded(one))
    loaded = load(folder)
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=0, atol=5e-6)
    assert loaded.quantised is not None
    assert loaded.quantised.startswith("fp8, 8.")
    assert loaded.quantised.endswith("bits a weight with one scale an output channel")
    assert loaded.products is None
    held = [p for p in loaded.model.parameters() if isinstance(p, Weight4)]
    bits = 8 * sum(p.nbytes_stored for p in held) / sum(p.numel() for p in held)
    assert 8.2 < bits < 8.6, "a float32 for each row of 64 to 128"


@pytest.mark.parametrize("quantize", ["fp8", "nf4"])
def test_a_cpu_computes_the_same_products_if_asked(folder: Path, quantize: str) -> None:
    plain, eight = load(folder, quantize=quantize), load(folder, quantize=quantize, fp8=True)
    assert eight.products == "multiplied in 8-bit floats, forward and backward"
    off = (logits(eight.model) - logits(plain.model)).norm() / logits(plain.model).norm()
    assert 1e-3 < off < 0.15
    made = quantize_model(
        tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), quantize
    )
    assert use_fp8(made, "auto", CPU) == []
    assert not any(p.fp8 for p in made.parameters() if isinstance(p, Weight4))
    assert use_fp8(made, True, CPU) == []
    torch.testing.assert_close(logits(made), logits(eight.model), rtol=0, atol=1e-5)


def test_adapters_get_nearly_the_same_gradient(tmp_path: Path) -> None:
    """Cosines over all adapters of a random model, which is no gentler than a trained one."""
    folder = written(tmp_path / "m", "llama")
    found = []
    for wanted in (False, True):
        model = load(folder, fp8=wanted).model
        adapters = attach(model, r=4)
        adapters.train()
        gen = torch.Generator().manual_seed(5)
        for parameter in adapters.parameters():
            parameter.data = torch.randn(parameter.shape, generator=gen) * 0.1
        loss = nn.functional.cross_entropy(model(IDS).logits.flatten(0, 1), IDS.flatten())
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in adapters.parameters()]))
    assert torch.cosine_similarity(*found, dim=0) > 0.97


def test_merging_adds_to_the_rounded_weight(tmp_path: Path) -> None:
    model = load(written(tmp_path / "m", "llama"), fp8=True).model
    adapters = attach(model, r=4, target_modules=["q_proj"])
    for parameter in adapters.parameters():
        parameter.data.normal_()
    name, bank = next(iter(adapters.banks.items()))
    site = bank.sites["default"][0]
    want = dense(model.get_parameter(f"{name}.weight")) + site.method.delta(site.layer, site.p)
    torch.testing.assert_close(bank.merged_weight(), want, rtol=0, atol=1e-5)


def test_asked_for_where_it_cannot_be(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", "llama")
    with pytest.raises(UserError, match="no weight of this model is quantised") as caught:
        load(folder, quantize="none", fp8=True)
    assert "model.quantize=fp8" in str(caught.value.hint)
    model = load(folder).model
    with pytest.raises(UserError, match="no 8-bit products here: they need an NVIDIA GPU"):
        use_fp8(model, True, torch.device("mps"))


def test_weights_that_stay_as_they_are_are_named(tmp_path: Path) -> None:
    sizes = {"odd": 40, "wild": 128, "plain": 128}
    layers = nn.ModuleDict({name: nn.Linear(size, 32) for name, size in sizes.items()})
    layers["wild"].weight.data[:, 7] = 2.0**15  # in 8 bits nothing is left of the block beside it
    quantize_model(layers, "nf4", double=False)
    notes = use_fp8(layers, True, CPU)
    assert [bool(p.fp8) for p in layers.parameters() if isinstance(p, Weight4)] == [False, False, True]
    assert notes[0] == "not multiplied in 8-bit floats: odd.weight (40 is no multiple of 16)"
    assert "wild.weight" in notes[1]
    assert "too small beside their channel's largest" in notes[1]
    assert LOST == 1e-3
    for name, size in sizes.items():
        layers[name](torch.randn(3, size))


@pytest.mark.filterwarnings("ignore")
def test_a_plan_counts_8_bits(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", "llama")
    settings = {"model.dtype": "float32", "model.quantize": "fp8"}
    planned = api.plan(model=str(folder), settings=settings | {"model.fp8": False}, offline=True)
    assert planned["quantize"] == "fp8"
    assert planned["base_bytes"] == pytest.approx(load(folder).bytes, abs=64)  # and buffers
    planned = api.plan(model=str(folder), settings=settings | {"model.fp8": True}, offline=True)
    assert planned["base_bytes"] == pytest.approx(load(folder, fp8=True).bytes, abs=64)


@pytest.mark.parametrize("table", ["nf4", "fp8"])
def test_meta_takes_the_same_products(table: str) -> None:
    with torch.device("meta"):
        layers = quantize_model(nn.Sequential(nn.Linear(64, 32)), table)
    assert use_fp8(layers, True, torch.device("meta")) == []
    x = torch.empty(3, 64, device="meta", requires_grad=True)
    y = layers(x)
    y.backward(torch.empty_like(y))
    assert (y.shape, x.grad.shape) == ((3, 32), (3, 64))  # type: ignore[union-attr]
