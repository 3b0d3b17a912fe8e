"""4-bit weights: bit-equal to bitsandbytes on a CPU, the kernels bit-equal to the definitions, errors as published.

Without a GPU the kernels run under Triton's interpreter, which cuts float32 off where a GPU rounds it to
bfloat16 (one step at most) and cannot round to fp8; there the numbers before that rounding are compared.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraloom.kernels import quant4, twin
from loraloom.kernels.fp8 import power_of_two
from loraloom.kernels.quant4 import (
    BLOCKS,
    TABLES,
    Scales8,
    channel_scale,
    dequantize4,
    dequantize4_fp8,
    dequantize_scales,
    quantize4,
    quantize_scales,
    table,
    thresholds,
)
from loraloom.kernels.scales8 import dequantize8, dynamic_map, quantize8

GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def bnb() -> Iterator[ModuleType]:
    functional = pytest.importorskip("bitsandbytes").functional
    with torch.compiler.set_stance("force_eager"):  # it compiles one of its loops, for each shape anew
        yield functional


@pytest.fixture(scope="module")
def device() -> torch.device:
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    pytest.importorskip("triton")
    return torch.device("cuda" if GPU else "cpu")


def bits(x: Tensor) -> Tensor:
    return x.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.dtype.itemsize])


def nibbles(packed_H: Tensor) -> Tensor:
    return torch.stack([packed_H >> 4, packed_H & 15], 1).flatten()


def zero_without_sign(packed_H: Tensor) -> Tensor:
    """fp4 has two codes for zero; on a CPU bitsandbytes swaps them."""
    codes = nibbles(packed_H)
    return torch.where(codes == 8, 0, codes)


def weights(n: int, seed: int, kind: str) -> Tensor:
    w = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.02
    if kind == "spikes":
        w[::37] *= 1e4
    if kind == "zeros":
        w[n // 3 : n // 3 + 200] = 0.0
        w[-1] = -0.0
    if kind == "minute":  # scales below the smallest normal number, and codes around zero
        w[: n // 2] *= 1e-38
        w[n // 2 :: 2] *= 1e-4
    if kind == "ties":  # multiples of a step, many of them on a threshold
        w = (torch.arange(n) % 25 - 12) / 12
    return w


# The tables


def test_nf4_is_the_published_construction():
    """Quantiles of N(0, 1) at float32 points, eight above zero and seven below, by the largest."""
    offset = 1 - (1 / 32 + 1 / 30) / 2
    upper, lower = (torch.special.ndtri(torch.linspace(0.9677083, 0.5, k)[:-1].double()) for k in (9, 8))
    built = torch.cat([upper, -lower, torch.zeros(1)]).sort().values.float()
    assert offset == pytest.approx(0.9677083, abs=5e-8)
    assert torch.equal(built / built.abs().max(), table("nf4"))


def test_fp4_and_e2m1_hold_their_formats_values():
    sixteenth = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert table("fp4").tolist() == pytest.approx([s * x / 12 for s in (1, -1) for x in sixteenth], rel=1e-7)
    for code, value in enumerate(
        table("e2m1").tolist()
    ):  # 1 sign bit, 2 exponent bits of bias 1, 1 mantissa bit
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        assert value * 6 == pytest.approx(-magnitude if code & 8 else magnitude, rel=1e-6)
        assert math.copysign(1, value) == (-1 if code & 8 else 1)


def test_thresholds_are_the_published_ones():
    nf4 = [-0.8480964, -0.6106329, -0.4599953, -0.3396794, -0.2346074, -0.1379117, -0.0455250]
    nf4 += [0.0397901, 0.1202552, 0.2035213, 0.2920137, 0.3893125, 0.5016634, 0.6427869, 0.8614784]
    assert thresholds("nf4").tolist() == pytest.approx(nf4, abs=1e-7)
    fp4 = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
    assert thresholds("fp4").tolist() == pytest.approx([*(-t for t in fp4[::-1]), 0, *fp4], abs=4e-7)
    halves = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    assert (thresholds("e2m1")[8:] * 6).tolist() == pytest.approx(halves, rel=1e-6)


def test_what_rounds_to_zero_keeps_its_sign():
    w = torch.tensor([1.0, 1e-4, -1e-4, 0.0, -0.0, -1e-30])
    for name in ("fp4", "e2m1"):
        packed_H, absmax_G = quantize4(w, table=name)
        assert nibbles(packed_H)[1:].tolist() == [0, 8, 0, 0, 8]
        back = dequantize4(packed_H, absmax_G, table=name, shape=(6,), block=64, dtype=torch.float32)
        assert torch.signbit(back[1:]).tolist() == [False, True, False, False, True]


# bitsandbytes


sizes = st.one_of(st.integers(1, 5000), st.sampled_from([1, 2, 63, 64, 65, 127, 128, 4095, 4096, 4097]))
kinds = st.sampled_from(["plain", "spikes", "zeros", "minute", "ties"])


@settings(deadline=None, max_examples=150)
@given(sizes, st.integers(0, 99), kinds, st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCKS), st.data())
def test_bits_equal_bitsandbytes(bnb, n, seed, kind, name, block, data):
    w = weights(n, seed, kind).to(data.draw(st.sampled_from(DTYPES)))
    packed_H, absmax_G = quantize4(w, table=name, block=block)
    theirs, state = bnb.quantize_4bit(w, blocksize=block, quant_type=name)
    assert torch.equal(bits(absmax_G), bits(state.absmax))
    as_codes = zero_without_sign if name == "fp4" else nibbles
    assert torch.equal(as_codes(packed_H), as_codes(theirs.view(-1)))
    back = dequantize4(packed_H, absmax_G, table=name, shape=w.shape, block=block, dtype=w.dtype)
    assert torch.equal(back, bnb.dequantize_4bit(theirs, state).view(w.shape))


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(0, 99), kinds, st.sampled_from(DTYPES))
def test_double_quantisation_equals_bitsandbytes(bnb, n, seed, kind, dtype):
    absmax_G = weights(n, seed, kind).abs()
    ours = quantize_scales(absmax_G)
    assert torch.equal(ours.offset, absmax_G.mean())
    code_G, absmax_S = nearest_of_bitsandbytes(bnb, absmax_G - absmax_G.mean())
    assert torch.equal(ours.code_G, code_G)
    assert torch.equal(ours.absmax_S, absmax_S)
    state = bnb.QuantState(absmax=absmax_S, code=bnb.create_dynamic_map(), blocksize=256, dtype=torch.float32)
    theirs = bnb.dequantize_blockwise(code_G, state) + ours.offset
    assert torch.equal(dequantize_scales(ours), theirs)

    packed_H = torch.randint(0, 256, (-(-n * 64 // 2),), dtype=torch.uint8)
    nested = bnb.QuantState(
        absmax=code_G,
        shape=torch.Size((n, 64)),
        dtype=dtype,
        blocksize=64,
        code=table("nf4"),
        quant_type="nf4",
        offset=ours.offset,
        state2=state,
    )
    back = dequantize4(packed_H, ours, table="nf4", shape=(n, 64), block=64, dtype=dtype)
    numbers = bnb.dequantize_4bit(packed_H.view(-1, 1), nested).view(n, 64)
    if dtype == torch.float32:
        assert torch.equal(back, numbers)
    else:  # on some processors its library rounds to 16 bits on the way
        assert (bits(back).int() - bits(numbers).int()).abs().max() <= 1


def nearest_of_bitsandbytes(bnb: ModuleType, x: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Its rule for every device without a library of its own; on a CPU the library would answer."""
    operation = torch.ops.bitsandbytes.quantize_blockwise.default
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    return operation._op_dk(key, x, bnb.create_dynamic_map(signed), 256)


def test_the_cpu_library_of_bitsandbytes_is_a_bin_beside_at_most(bnb):
    """It rounds to 65,536 bins first: few codes differ from ours, and those by the bin."""
    _, state = bnb.quantize_4bit(weights(3_000_000, 0, "plain"), blocksize=64, compress_statistics=True)
    absmax_G = quantize4(weights(3_000_000, 0, "plain"), table="fp4")[1]
    ours = quantize_scales(absmax_G)
    apart = ours.code_G != state.absmax
    assert 0 < apart.float().mean() < 0.003
    assert torch.equal(ours.absmax_S, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)
    assert torch.equal(dynamic_map(), state.state2.code)
    unit = (absmax_G - ours.offset) / ours.absmax_S.repeat_interleave(256)[: len(absmax_G)]
    near, theirs = ((dynamic_map()[code.int()] - unit).abs() for code in (ours.code_G, state.absmax))
    assert (near <= theirs + 1e-7).all()
    assert (theirs - near).max() < 2 / 65535


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_theirs(bnb, signed):
    assert torch.equal(dynamic_map(signed), bnb.create_dynamic_map(signed))
    assert dynamic_map(signed) is dynamic_map(signed, "cpu")
    x = torch.rand(1000) - (0.5 if signed else 0.0)
    ours, theirs = quantize8(x, dynamic_map(signed)), nearest_of_bitsandbytes(bnb, x, signed)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert dequantize8(*ours, dynamic_map(signed)).sub(x).abs().max() < 0.008


# Errors and sizes as published


@pytest.mark.parametrize(("name", "rmse"), [("nf4", 0.0920), ("e2m1", 0.1056), ("fp4", 0.1219)])
def test_error_on_a_normal_weight(name, rmse):
    w = torch.randn(4_000_000, generator=torch.Generator().manual_seed(1))
    packed_H, absmax_G = quantize4(w, table=name)

    def error(scales: Tensor | Scales8) -> float:
        back = dequantize4(packed_H, scales, table=name, shape=w.shape, block=64, dtype=torch.float32)
        return (back - w).square().mean().sqrt().item()

    assert error(absmax_G) == pytest.approx(rmse, abs=2e-4)
    assert error(quantize_scales(absmax_G)) == pytest.approx(error(absmax_G), rel=2e-3)


def test_bits_a_weight():
    w_OI = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(2)).bfloat16()
    packed_H, absmax_G = quantize4(w_OI, table="nf4")
    double = quantize_scales(absmax_G)

    def of(*tensors: Tensor) -> float:
        return 8 * sum(tensor.nbytes for tensor in tensors) / w_OI.numel()

    assert of(packed_H, absmax_G) == 4.5
    assert of(packed_H, double.code_G, double.absmax_S, double.offset) == pytest.approx(4.127, abs=5e-4)
    off = dequantize_scales(double) - absmax_G
    assert (off.square().mean().sqrt() / absmax_G.mean()).item() == pytest.approx(0.0022, abs=3e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_fp8_adds_its_rounding_and_no_more(transposed):
    """Rounding to three bits after the point is 2.65 % rms of a weight spread over the binades."""
    w_OI = torch.randn(384, 512, generator=torch.Generator().manual_seed(3)) * 0.02
    w_OI[:, 7] *= 40.0
    w_OI[5] = 0.0
    packed_H, absmax_G = quantize4(w_OI, table="nf4")
    form = {"table": "nf4", "shape": w_OI.shape, "block": 64}
    dense = dequantize4(packed_H, absmax_G, **form, dtype=torch.float32)
    scale = channel_scale(packed_H, absmax_G, **form, dim=int(transposed))
    amax = dense.abs().amax(0 if transposed else 1)
    mantissa, exponent = torch.frexp(amax / 448)
    least = torch.where(mantissa == 0.5, exponent - 1, exponent)
    assert torch.equal(scale, torch.where(amax == 0, 1.0, torch.exp2(least.double())).float())
    w8 = dequantize4_fp8(packed_H, absmax_G, scale, **form, transposed=transposed)
    assert w8.dtype == E4M3
    assert w8.is_contiguous()
    assert w8.shape == (w_OI.shape[::-1] if transposed else w_OI.shape)
    tops = w8.float().abs().amax(1)
    assert ((tops == 0) | ((tops >= 224) & (tops <= 448))).all(), "each channel uses the range's upper half"
    back = w8.float() * scale[:, None]
    off = (back.T if transposed else back)[dense != 0] / dense[dense != 0] - 1
    assert off.square().mean().sqrt().item() == pytest.approx(0.0265, abs=0.001)
    assert off.abs().max() <= 1 / 16 + 1e-6
    assert off.abs().max() > 0.05


def test_channels_of_next_to_nothing_come_out_as_zeros():
    w_OI = torch.randn(4, 64, generator=torch.Generator().manual_seed(7))
    w_OI[1], w_OI[2] = 0.0, w_OI[2] * 1e-40
    packed_H, absmax_G = quantize4(w_OI, table="nf4")
    form = {"table": "nf4", "shape": (4, 64), "block": 64}
    scale = channel_scale(packed_H, absmax_G, **form, dim=0)
    assert scale[1:3].tolist() == [1.0, 1.0]
    w8 = dequantize4_fp8(packed_H, absmax_G, scale, **form).float()
    assert w8.isfinite().all()
    assert (w8[1:3] == 0).all()
    assert (w8[[0, 3]].abs().amax(1) >= 224).all()


def test_the_least_power_of_two_that_brings_a_channel_within_448():
    top = torch.tensor(448.0)
    edges = torch.stack(
        [torch.nextafter(top, top * 0), top, torch.nextafter(top, top * 2), top * 2, top / 2**40]
    )
    assert power_of_two(edges).tolist() == [1, 1, 2, 2, 2**-40]
    spread = torch.rand(10000, generator=torch.Generator().manual_seed(8)) + 0.5
    spread *= 10.0 ** torch.linspace(-34, 35, 10000)
    scale = power_of_two(spread)
    over = spread.double() / scale.double()
    assert ((over > 224) & (over <= 448)).all()
    assert power_of_two(torch.tensor([0.0, 1e-42, 1e-36])).tolist() == [1, 1, 1], "no normal number"


@pytest.mark.parametrize("name", TABLES)
def test_a_matrix_and_its_transpose_hold_the_same_numbers(name):
    """Scales of rows or of columns shift exponents only; what differs underflows in one of the two."""
    w_OI = torch.randn(96, 160, generator=torch.Generator().manual_seed(11)) * 0.02
    w_OI[:, 3] *= 60.0
    w_OI[11] *= 1e-3
    packed_H, absmax_G = quantize4(w_OI, table=name, block=32)
    form = {"table": name, "shape": w_OI.shape, "block": 32}
    scale = [channel_scale(packed_H, absmax_G, **form, dim=dim) for dim in (0, 1)]
    straight = dequantize4_fp8(packed_H, absmax_G, scale[0], **form).float() * scale[0][:, None]
    turned = (
        dequantize4_fp8(packed_H, absmax_G, scale[1], **form, transposed=True).float() * scale[1][:, None]
    )
    dense = dequantize4(packed_H, absmax_G, **form, dtype=torch.float32)
    coarser = torch.maximum(scale[0][:, None], scale[1][None, :])
    small = (dense != 0) & (dense.abs() < 2.0**-6 * coarser)
    assert torch.equal(straight[~small], turned.T[~small])
    assert 0 < small.float().mean() < 0.05
    assert (straight - turned.T).abs().max() <= 2.0**-10 * torch.maximum(scale[0].max(), scale[1].max())


# The kernels


def both(operation, *args, **kwargs) -> tuple[Tensor, Tensor]:
    with twin.forced("torch"):
        definition = operation(*args, **kwargs)
    with twin.forced("triton"):
        return definition, operation(*args, **kwargs)


def assert_same(definition: Tensor, kernel: Tensor, what: object) -> None:
    assert definition.dtype == kernel.dtype
    assert definition.shape == kernel.shape, what
    steps = (bits(definition).int() - bits(kernel).int()).abs().max()
    cut_off = not GPU and kernel.dtype == torch.bfloat16
    assert steps <= int(cut_off), f"{what}: {steps} steps apart"


def test_the_kernels_equal_the_definitions(device):
    from loraloom.kernels.quant4_triton import cases

    for number, (w_OI, name, block, double) in enumerate(cases(device)):
        what = (tuple(w_OI.shape), name, block, double)
        coded = both(quantize4, w_OI.to(DTYPES[number % 3]), table=name, block=block)
        if GPU:  # its reciprocal is a bit off the definition's: a weight on a threshold goes either way
            assert (coded[0][0] != coded[1][0]).float().mean() < 1e-3, what
        else:
            assert_same(coded[0][0], coded[1][0], what)
            assert_same(coded[0][1], coded[1][1], what)
        packed_H, scales = coded[0]
        scales = quantize_scales(scales) if double else scales
        form = {"table": name, "shape": w_OI.shape, "block": block}
        for dtype in DTYPES:
            assert_same(*both(dequantize4, packed_H, scales, **form, dtype=dtype), (*what, dtype))
        for dim in (0, 1):
            scale = both(channel_scale, packed_H, scales, **form, dim=dim)
            assert_same(*scale, (*what, dim))
            if GPU:
                pair = both(dequantize4_fp8, packed_H, scales, scale[0], **form, transposed=bool(dim))
                assert_same(*pair, (*what, dim))
            assert_same(*unrounded(packed_H, scales, scale[0], w_OI.shape, name, block, bool(dim)), what)


def unrounded(packed_H, scales, scale, shape, name, block, transposed) -> list[Tensor]:
    """The fp8 weights of both before they are rounded."""
    found = []
    for path in ("torch", "triton"):
        w8 = torch.full(shape[::-1] if transposed else shape, math.nan, device=packed_H.device)
        with twin.forced(path):
            quant4._dequantize4_fp8(
                packed_H, scales, scale, w8, table=name, block=block, transposed=transposed
            )
        found.append(w8)
    return found


def test_columns_of_a_wider_matrix_are_written(device):
    """Three weights of one input side by side: each by itself, and nothing beside it."""
    generator = torch.Generator(device).manual_seed(9)
    for outs, width in (((48, 16, 16), 64), ((5, 3, 7), 21)):
        whole = torch.full((width, sum(outs) + 8), math.nan, device=device)
        beside = torch.full((max(outs), width + 16), 7.0, device=device)
        at = 0
        for out in outs:
            w_OI = torch.randn(out, width, device=device, generator=generator)
            packed_H, absmax_G = quantize4(w_OI, table="nf4")
            form = {"table": "nf4", "block": 64}
            dense = dequantize4(packed_H, absmax_G, **form, shape=w_OI.shape, dtype=torch.float32)
            for path in ("torch", "triton"):
                with twin.forced(path):
                    view = beside[:out, 16:]
                    got = dequantize4(
                        packed_H, absmax_G, **form, shape=w_OI.shape, dtype=torch.float32, out=view
                    )
                    assert got.data_ptr() == view.data_ptr()
                    assert torch.equal(view, dense)
                    assert (beside[:, :16] == 7.0).all(), "written beside the columns"
                    view.fill_(0)
                    scale = channel_scale(packed_H, absmax_G, **form, shape=w_OI.shape, dim=1)
                    columns = whole[:, at : at + out].fill_(math.nan)
                    quant4._dequantize4_fp8(packed_H, absmax_G, scale, columns, **form, transposed=True)
                    assert torch.equal(columns, (dense / scale).T)
                    rows = channel_scale(packed_H, absmax_G, **form, shape=w_OI.shape, dim=0)
                    quant4._dequantize4_fp8(packed_H, absmax_G, rows, view, **form, transposed=False)
                    assert torch.equal(view, dense / rows[:, None])
                    view.fill_(0)
            at += out
        assert whole[:, at:].isnan().all()
        assert not whole[:, :at].isnan().any()


def test_the_kernels_take_views(device):
    """A slice of a buffer that does not start on four bytes, and a weight that is not contiguous."""
    w_OI = torch.randn(40, 96, device=device, generator=torch.Generator(device).manual_seed(4))
    packed_H, absmax_G = quantize4(w_OI, table="nf4")
    held = torch.zeros(len(packed_H) + 8, dtype=torch.uint8, device=device)
    for start in (1, 2, 4):
        part = held[start : start + len(packed_H)].copy_(packed_H)
        form = {"table": "nf4", "shape": (40, 96), "block": 64, "dtype": torch.float32}
        assert_same(*both(dequantize4, part, absmax_G, **form), start)
    definition, kernel = both(quantize4, w_OI.T, table="nf4")
    assert_same(definition[0], kernel[0], "transposed")
    assert torch.equal(definition[0], quantize4(w_OI.T.contiguous(), table="nf4")[0])


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_more_weights_than_32_bits_count(device):
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    shape = (2**17 + 8, 2**14)
    n = math.prod(shape)
    packed_H = torch.randint(0, 256, (n // 2,), dtype=torch.uint8, device=device)
    absmax_G = torch.rand(n // 64, device=device)
    form = {"table": "nf4", "block": 64, "dtype": torch.bfloat16}
    w_OI = dequantize4(packed_H, absmax_G, shape=shape, **form)
    rows = 16
    with twin.forced("torch"):
        last = rows * shape[1]
        end = dequantize4(packed_H[-last // 2 :], absmax_G[-last // 64 :], shape=(rows, shape[1]), **form)
    assert_same(end, w_OI[-rows:], "the last rows")
    del packed_H, absmax_G
    packed_H, absmax_G = quantize4(w_OI, table="nf4")
    with twin.forced("torch"):
        codes, scales = quantize4(end, table="nf4")
    assert_same(codes, packed_H[-last // 2 :], "their codes")
    assert_same(scales, absmax_G[-last // 64 :], "their scales")


# Shapes, buffers and refusals


def test_shapes_buffers_and_dtypes():
    w = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(5))
    packed_H, absmax_G = quantize4(w, table="nf4", block=32)
    assert (packed_H.shape, absmax_G.shape) == ((53,), (4,))
    assert torch.equal(packed_H, quantize4(w.double().requires_grad_(), table="nf4", block=32)[0])
    form = {"table": "nf4", "shape": (3, 5, 7), "block": 32}
    dense = dequantize4(packed_H, absmax_G, **form, dtype=torch.float32)
    held = torch.full((200,), 9.0, dtype=torch.float16)
    view = dequantize4(packed_H, absmax_G, **form, dtype=torch.float16, out=held)
    assert view.data_ptr() == held.data_ptr()
    assert torch.equal(view, dense.half())
    assert (held[105:] == 9.0).all(), "written behind the end"
    many = torch.randn(
        2**18 * 2 + 33, generator=torch.Generator().manual_seed(6)
    )  # three pieces, the last short
    packed_H, absmax_G = quantize4(many, table="e2m1", block=4096)
    last = quantize4(many[2**19 :], table="e2m1", block=4096)
    assert torch.equal(packed_H[2**18 :], last[0])
    assert torch.equal(absmax_G[128:], last[1])
    back = dequantize4(packed_H, absmax_G, table="e2m1", shape=many.shape, block=4096, dtype=torch.float32)
    assert (back - many).abs().max() <= absmax_G.max() / 6


def test_meta_tensors_give_shapes_only():
    w = torch.empty(48, 40, device="meta", dtype=torch.bfloat16)
    packed_H, absmax_G = quantize4(w, table="nf4")
    double = quantize_scales(absmax_G)
    assert [t.shape for t in (packed_H, absmax_G, double.absmax_S, double.offset)] == [
        (960,),
        (30,),
        (1,),
        (),
    ]
    assert dequantize_scales(double).shape == (30,)
    form = {"table": "nf4", "shape": (48, 40), "block": 64}
    dense = dequantize4(packed_H, double, **form, dtype=torch.bfloat16)
    scale = channel_scale(packed_H, double, **form, dim=1)
    w8 = dequantize4_fp8(packed_H, double, scale, **form, transposed=True)
    assert (dense.shape, scale.shape, w8.shape) == ((48, 40), (40,), (40, 48))
    assert {t.device.type for t in (packed_H, double.code_G, dense, scale, w8)} == {"meta"}
    assert (dense.dtype, w8.dtype) == (torch.bfloat16, E4M3)


def test_weights_that_cannot_be_coded():
    w = torch.randn(100)
    w[3], w[50], w[99] = math.nan, math.inf, -math.inf
    with pytest.raises(ValueError, match="3 of 100 weights are not finite"):
        quantize4(w, table="nf4")
    with pytest.raises(ValueError, match="1 of 2 weights are not finite"):
        quantize4(torch.tensor([1.0, 1e300], dtype=torch.float64), table="nf4")
    for wrong in (torch.empty(0, 4), torch.ones(4, dtype=torch.int32)):
        with pytest.raises(ValueError, match="cannot be coded"):
            quantize4(wrong, table="nf4")
    with pytest.raises(ValueError, match="nothing to code"):
        quantize_scales(torch.empty(0))
    with pytest.raises(ValueError, match="no 4-bit table 'nf5'"):
        table("nf5")
    for name, block in (("nf5", 64), ("nf4", 16), ("nf4", 100)):
        with pytest.raises(ValueError, match=f"no 4-bit format '{name}' in blocks of {block}"):
            quantize4(torch.ones(4), table=name, block=block)


def test_buffers_that_do_not_fit():
    packed_H, absmax_G = quantize4(torch.randn(10, 64), table="nf4")
    form = {"table": "nf4", "shape": (10, 64), "block": 64}
    f32 = {**form, "dtype": torch.float32}
    double = quantize_scales(absmax_G)
    need = (
        r"640 weights in blocks of 64 need 320 bytes and 10 scales in float32, or in 8 bits with 1 in float32"
    )
    for codes, scales in [
        (packed_H[:-1], absmax_G),
        (packed_H, absmax_G[:-1]),
        (packed_H, absmax_G.half()),
        (packed_H.int(), absmax_G),
        (packed_H.view(-1, 1), absmax_G),
        (packed_H, Scales8(double.code_G[:-1], double.absmax_S, double.offset)),
        (packed_H, Scales8(double.code_G, double.absmax_S.repeat(2), double.offset)),
    ]:
        with pytest.raises(ValueError, match=need):
            dequantize4(codes, scales, **f32)
        with pytest.raises(ValueError, match=need):
            channel_scale(codes, scales, **form, dim=0)
    with pytest.raises(ValueError, match="`out` must be flat, with room for 640"):
        dequantize4(packed_H, absmax_G, **f32, out=torch.empty(639))
    for wrong in (torch.empty(640, dtype=torch.float16), torch.empty(64, 10), torch.empty(64, 10).T):
        with pytest.raises(ValueError, match="`out` must be flat"):
            dequantize4(packed_H, absmax_G, **f32, out=wrong)
    with pytest.raises(ValueError, match=r"not in torch\.float64"):
        dequantize4(packed_H, absmax_G, **form, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\[64\] scales of torch.float32 for \[10, 64\], transposed: False"):
        dequantize4_fp8(packed_H, absmax_G, torch.ones(64), **form)
    with pytest.raises(ValueError, match="asked was 2"):
        channel_scale(packed_H, absmax_G, **form, dim=2)


# Pairs


def test_twins_are_chosen_by_device_and_can_be_forced(monkeypatch):
    calls = []

    def definition(x, *, k=1):
        calls.append("torch")

    @twin.twin(definition)
    def operation(x, *, k=1):
        calls.append("triton")

    x = torch.zeros(2)
    operation(x)
    with twin.forced("triton"):
        operation(x, k=2)
        with twin.forced("torch"):
            operation(x=x)
        operation(x)
        assert twin.path_of(x.device) == ("triton", "asked for")
    operation(x)
    assert calls == ["torch", "triton", "torch", "triton", "torch"]
    assert twin.path_of(torch.device("cpu")) == ("torch", "the kernels need a CUDA GPU")
    for has, path in ((True, "triton"), (False, "torch")):
        monkeypatch.setattr(twin, "has_triton", lambda has=has: has)
        assert twin.path_of(torch.device("cuda", 1))[0] == path
    with pytest.raises(TypeError, match="without one"):
        operation(3)
    with pytest.raises(TypeError, match="differ in their signatures"):
        twin.twin(definition)(lambda x, *, other: None)
    assert {name.rpartition(".")[2] for name in twin.PAIRS} >= {"_quantize4", "_dequantize4", "_channel_amax"}


def test_without_triton_everything_runs_on_a_cpu():
    code = """
import sys
sys.modules["triton"] = None
import torch
from loraloom.kernels import quant4 as q
for name in q.TABLES:
    packed_H, absmax_G = q.quantize4(torch.randn(128), table=name)
    q.dequantize4(packed_H, absmax_G, table=name, shape=(128,), block=64, dtype=torch.float32)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert len(TABLES) == 3


@pytest.mark.skipif(not GPU, reason="bitsandbytes' CUDA kernels need a GPU; its CPU bits are held above")
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 63, 64, 1000003, 4096 * 4096])
def test_bits_equal_bitsandbytes_on_the_gpu(bnb, name, dtype, n):
    """Bytes, scales, scales of scales and the way back: all of them, from the same weights.

    Of float32 weights one in ten million may stand on a threshold to the last bit.
    """
    w = (torch.randn(n, device="cuda") * 0.02).to(dtype)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type=name, compress_statistics=True)
    packed_H, absmax_G = quantize4(w, table=name)
    most = 1e-7 if dtype == torch.float32 else 0.0
    assert (packed_H != theirs.view(-1)).sum() <= math.ceil(most * n)
    ours = quantize_scales(absmax_G)
    if n > 64:  # a single scale lies at its offset: zero, which has several codes
        assert torch.equal(ours.code_G, state.absmax)
        assert torch.equal(ours.absmax_S, state.state2.absmax)
    assert float(ours.offset) == float(state.offset)
    back = dequantize4(theirs.view(-1), ours, table=name, shape=(n,), block=64, dtype=dtype)
    assert torch.equal(back, bnb.dequantize_4bit(theirs, state).view(-1))


@pytest.mark.skipif(not GPU, reason="bitsandbytes' CUDA kernels need a GPU")
def test_zeros_stay_zeros_where_bitsandbytes_divides_them_by_zero(bnb):
    """Its CUDA kernel gives a block of zeros nf4's code 0, -1, times a scale that double quantisation makes small but
    not zero; ours is the code of zero."""
    w = torch.randn(64 * 512, device="cuda")
    w[640:704] = 0
    packed_H, absmax_G = quantize4(w, table="nf4")
    form = {"table": "nf4", "shape": (len(w),), "block": 64, "dtype": torch.float32}
    assert not dequantize4(packed_H, quantize_scales(absmax_G), **form)[640:704].any()
    theirs, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed_H[:320], theirs.view(-1)[:320])
    assert bnb.dequantize_4bit(theirs, state)[640:704].any()
