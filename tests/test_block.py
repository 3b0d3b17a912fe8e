"""The passes between a decoder layer's products: kernels against their definitions, definitions against autograd."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.kernels import block
from loraloom.kernels.block import add_low, add_norm, norm_grad, rope, rope_grad, swiglu, swiglu_grad
from loraloom.kernels.dropout import keyed_dropout, token_key
from loraloom.kernels.twin import forced

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 17 * len(shape) + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def pair(tokens: int, out: int, rank: int, dtype: torch.dtype, seed: int = 5) -> tuple[Tensor, Tensor]:
    return draw(tokens, rank, seed=seed, dtype=dtype), draw(out, rank, seed=seed + 1, dtype=dtype, scale=0.1)


def angles(tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = draw(tokens, width // 2, seed=9, scale=3.0).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


# ---- kernels against their definitions ------------------------------------------------------------------------

# Tokens, width and rank: ragged rows, ragged columns, several spans of tokens.
SIZES = [(5, 32, 16), (33, 144, 32), (48, 272, 64), (150, 48, 16)]
DTYPES = [
    torch.float32,
    *([torch.bfloat16] if DEVICE.type == "cuda" else []),
]  # the interpreter has no bfloat16


def same(shown: Any, wanted: Any, dtype: torch.dtype) -> None:
    """Equal up to rounding: sums are taken in another order, so a last bit may differ, in 8 bits one step."""
    rel = 2e-5 if dtype == torch.float32 else 2e-2
    for got, want in zip(flat(shown), flat(wanted), strict=True):
        torch.testing.assert_close(
            got.float(), want.float(), rtol=rel, atol=rel * float(want.float().abs().max())
        )


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if value is None:
        return []
    if isinstance(value, block.Rows8):
        return [value.scale]
    parts = value if isinstance(value, tuple | list) else vars(value).values()
    return [tensor for part in parts for tensor in flat(part)]


def codes_of(value: Any) -> list[Tensor]:
    if isinstance(value, block.Rows8):
        return [value.codes.float()]
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in codes_of(part)]
    return [t for part in vars(value).values() for t in codes_of(part)] if hasattr(value, "__dict__") else []


def both(run: Callable[[], Any], dtype: torch.dtype) -> None:
    with forced("torch"):
        wanted = run()
    with forced("triton"):
        shown = run()
    same(shown, wanted, dtype)
    pairs = list(zip(codes_of(shown), codes_of(wanted), strict=True))
    for got, want in pairs:  # one step of e4m3 where rounding differs
        if (
            DEVICE.type == "cuda"
        ):  # the interpreter loses the carry of a mantissa that rounds up to the next power
            torch.testing.assert_close(got, want, rtol=0.13, atol=0.13 * float(want.abs().mean()))
        assert float((got != want).float().mean()) < (0.05 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "rank"), SIZES)
@pytest.mark.parametrize("form", ["plain", "added", "both", "codes"])
def test_add_norm(tokens: int, width: int, rank: int, dtype: torch.dtype, form: str) -> None:
    x, y, w = (
        draw(tokens, width, dtype=dtype),
        draw(tokens, width, seed=1, dtype=dtype),
        draw(width, dtype=dtype),
    )
    forms: dict[str, dict[str, Any]] = {
        "plain": {},
        "added": {"y": y},
        "both": {"y": y, "quantize": True},
        "codes": {"quantize": True, "keep": False},
    }
    both(lambda: add_norm(x, w, EPS, **forms[form]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "rank"), SIZES)
@pytest.mark.parametrize("whole", [False, True])
def test_norm_grad(tokens: int, width: int, rank: int, dtype: torch.dtype, whole: bool) -> None:
    x, w = draw(tokens, width, dtype=dtype), draw(width, dtype=dtype)
    rstd = (x.float().square().mean(1) + EPS).rsqrt()
    rest = {"dres": draw(tokens, width, seed=7, dtype=dtype), "quantize": True, "keep_n": True}

    def run() -> Any:
        dn = draw(tokens, width, seed=4, dtype=dtype)
        return norm_grad(dn, x, rstd, w, **(rest if whole else {})), dn

    both(run, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "rank"), SIZES)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_swiglu(tokens: int, width: int, rank: int, dtype: torch.dtype, act: block.Act) -> None:
    gu, low = draw(tokens, 2 * width, dtype=dtype), pair(tokens, 2 * width, rank, dtype)
    both(lambda: swiglu(gu, act), dtype)
    both(lambda: swiglu(gu, act, low=low), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "rank"), SIZES)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("whole", [False, True])
def test_swiglu_grad(
    tokens: int, width: int, rank: int, dtype: torch.dtype, act: block.Act, whole: bool
) -> None:
    dlow = draw(tokens, rank, seed=5, dtype=dtype), draw(rank, width, seed=6, dtype=dtype, scale=0.1)
    rest = {"low": pair(tokens, 2 * width, rank, dtype), "dlow": dlow, "keep_h": True}

    def run() -> Any:
        gu, dh = draw(tokens, 2 * width, dtype=dtype), draw(tokens, width, seed=3, dtype=dtype)
        sums = swiglu_grad(gu, act, dh, **(rest if whole else {}))
        return gu, dh if whole else None, sums

    both(run, dtype)


@pytest.mark.parametrize("rank", [16, 64])
def test_smaller_schedules_for_gpus_with_little_shared_memory_compute_the_same(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraloom.kernels import block_mlp_triton, block_rope_triton, block_tiles_triton

    asked: list[Tensor] = []
    for file in (block_mlp_triton, block_rope_triton):
        monkeypatch.setattr(file, "roomy", lambda x: bool(asked.append(x)))
    test_swiglu(33, 48, rank, torch.float32, "silu")
    test_swiglu_grad(150, 48, rank, torch.float32, "silu", whole=True)
    test_rope(4, 2, 32, 32, torch.float32)
    assert len(asked) >= 4
    monkeypatch.setattr(block_tiles_triton, "shared_memory", lambda device: 99 * 1024)

    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(1, dtype=dtype).as_subclass(OnGpu)
        assert block_tiles_triton.roomy(x) == (dtype == torch.bfloat16)


def test_what_is_kept_ahead_fits_into_shared_memory() -> None:
    """The compiler tells, for GPUs that need not be here; not where kernels are interpreted, so in another process."""
    script = Path(__file__).parent / "kernel_room.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, *_ in lines} == {"_swiglu_grad", "_rope"}
    assert [line for line in lines if int(line[2]) > int(line[3])] == []
    assert max(int(takes) for _, _, takes, _ in lines) > 100_000  # what smaller GPUs could not have


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "rank"), SIZES)
@pytest.mark.parametrize("turned", [False, True])
def test_add_low(tokens: int, width: int, rank: int, dtype: torch.dtype, turned: bool) -> None:
    y, (z, b) = draw(tokens, width, seed=1, dtype=dtype), pair(tokens, width, rank, dtype)
    m = b.T.contiguous() if turned else b
    x = draw(tokens, width, dtype=dtype)
    both(lambda: add_low(x, (z, m), turned=turned), dtype)
    both(lambda: add_low(x.clone(), (z, m), y=y, turned=turned, over=True), dtype)
    with forced("torch"):
        wanted = torch.addmm(x.double() + y.double(), z.double(), b.double().T)
        torch.testing.assert_close(add_low(x, (z, m), y=y, turned=turned), wanted.to(dtype))
        assert add_low(x, (z, m), turned=turned, over=True) is x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "groups", "dim", "part"), [(4, 4, 16, 16), (8, 2, 32, 32), (2, 1, 48, 24)])
def test_rope(heads: int, groups: int, dim: int, part: int, dtype: torch.dtype) -> None:
    tokens, width = 21, (heads + 2 * groups) * dim
    cos, sin = angles(tokens, part, dtype)
    low = pair(tokens, width, 16, dtype)

    def there(low: Any) -> Tensor:
        qkv = draw(tokens, width, dtype=dtype)
        rope(qkv, cos, sin, (heads, groups), low=low)
        return qkv

    both(lambda: there(None), dtype)
    both(lambda: there(low), dtype)
    grads = [draw(n, tokens, dim, seed=n, dtype=dtype).transpose(0, 1) for n in (heads, groups, groups)]
    both(lambda: rope_grad(*grads, cos, sin), dtype)


# ---- definitions against autograd, in float64 -------------------------------------------------------------------


def double(*shape: int, seed: int) -> Tensor:
    return draw(*shape, seed=seed).cpu().double().requires_grad_()


def test_norm_grad_is_autograds() -> None:
    x, y, w, dn, dres = (
        double(*s, seed=i) for i, s in enumerate([(7, 24), (7, 24), (24,), (7, 24), (7, 24)])
    )
    total = x + y
    n = F.rms_norm(total, (24,), w, EPS)
    made = add_norm(x.detach(), w.detach(), EPS, y=y.detach())
    torch.testing.assert_close(made.x, total.detach())
    torch.testing.assert_close(made.n.dense, n.detach())
    (wanted,) = torch.autograd.grad([n, total], [total], [dn, dres])
    memory = dn.detach().clone()
    got = norm_grad(memory, made.x, made.rstd, w.detach(), dres=dres.detach(), keep_n=True)
    torch.testing.assert_close(got.dense, wanted)
    torch.testing.assert_close(memory, n.detach())


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_swiglu_grad_is_autograds(act: block.Act) -> None:
    gu, z, b, a, dh, dz = (
        double(*s, seed=i) for i, s in enumerate([(7, 40), (7, 3), (40, 3), (3, 20), (7, 20), (7, 3)])
    )
    whole = gu + z @ b.T
    g, u = whole.chunk(2, 1)
    h = (F.silu(g) if act == "silu" else F.gelu(g, approximate="tanh")) * u
    low = z.detach(), b.detach()
    torch.testing.assert_close(swiglu(gu.detach(), act, low=low), h.detach())
    wanted, db, da = torch.autograd.grad([h, h @ a.T], [whole, b, a], [dh, dz])
    memory, out = dh.detach().clone(), gu.detach().clone()
    sums = swiglu_grad(out, act, memory, low=low, dlow=(dz.detach(), a.detach()), keep_h=True)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(memory, h.detach())
    torch.testing.assert_close([sums.db, sums.da], [db, da])
    assert swiglu_grad(gu.detach().clone(), act, dh.detach().clone()) == block.Sums(None, None)
    none = swiglu_grad(out[:0], act, memory[:0], low=(z.detach()[:0], b.detach()))
    assert none.db is not None
    assert not none.db.any()


@pytest.mark.parametrize("part", [16, 8])
def test_rope_is_transformers(part: int) -> None:
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    tokens, heads, groups, dim = 9, 4, 2, 16
    cos, sin = (one.double().cpu() for one in angles(tokens, part, torch.float64))
    qkv = double(tokens, (heads + 2 * groups) * dim, seed=1)
    q, k, v = qkv.unflatten(1, (-1, dim)).split([heads, groups, groups], dim=1)
    turned_q, turned_k = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None]
    )
    out = qkv.detach().clone()
    rope(out, cos, sin, (heads, groups))
    wanted = [turned_q[0].transpose(0, 1), turned_k[0].transpose(0, 1), v]
    torch.testing.assert_close(out, torch.cat(wanted, 1).flatten(1).detach())
    grads = [double(*one.shape, seed=3 + i).detach() for i, one in enumerate(wanted)]
    (gradient,) = torch.autograd.grad(wanted, [qkv], grads)
    torch.testing.assert_close(rope_grad(*grads, cos, sin), gradient)


def test_shapes_alone_ask_for_the_same_room() -> None:
    x, w = torch.empty(6, 32, device="meta"), torch.empty(32, device="meta")
    made = add_norm(x, w, EPS, y=x, quantize=True, keep=False)
    assert made.n.dense is None
    assert made.n.codes is not None
    assert made.n.codes.codes.shape == (6, 32)
    assert swiglu(x, "silu").shape == (6, 16)
    thin, b, a = (torch.empty(*shape, device="meta") for shape in [(6, 4), (32, 4), (4, 16)])
    sums = swiglu_grad(x, "silu", x[:, :16], low=(thin, b), dlow=(thin, a))
    assert sums.db is not None
    assert sums.da is not None
    assert (sums.db.shape, sums.da.shape) == ((32, 4), (4, 16))
    assert add_low(x, (thin, b)).shape == x.shape


def test_a_span_is_a_power_of_two_and_long_lines_have_many() -> None:
    for tokens in (1, 63, 64, 512, 513, 8192, 20_480, 10**6):
        span = block.span_of(tokens)
        assert span.bit_count() == 1
        assert 64 <= span <= 1024
        assert -(-tokens // span) >= min(4, -(-tokens // 64))


@pytest.mark.parametrize("each", [False, True])
def test_dropout_is_its_definition_bit_for_bit(each: bool) -> None:
    x = draw(3, 7, 1500)
    key = token_key(torch.arange(21, device=DEVICE).view(3, 7) + 2**33, seed=5, step=2**31, group=9)
    rate = torch.rand(3, 7, dtype=torch.float64, device=DEVICE) * 0.9 if each else 0.05
    with forced("torch"):
        wanted = keyed_dropout(x, key, rate)
    with forced("triton"):
        assert torch.equal(keyed_dropout(x, key, rate), wanted)
    dropped = float((wanted == 0).float().mean())
    assert abs(dropped - (float(torch.as_tensor(rate).mean()))) < 0.02
