"""One step of AdamW whose moments are kept in 8 bits, a scale for every 256 of them.

    m = map_s[code] absmax            m' = beta1 m + (1 - beta1) g        and v alike with map_u, beta2 and g^2
    p' = (1 - lr wd) p - lr / (1 - beta1^t) * m' / (sqrt(v') / sqrt(1 - beta2^t) + eps)
    absmax' = max |m'| of the block,  code' = the entry of the map nearest to m' / absmax'

The parameter moves by the float32 moments; only what is kept for the next step is rounded (`scales8`: the nearest
entry, a tie goes down). Every product and sum is rounded to float32 by itself, nothing is fused, in both twins, so
they agree bit for bit. Memory beside the state: a few times CHUNK float32 for the definition, none for the kernel.
Gradients must be finite: the caller has looked.

bitsandbytes' GPU kernel differs in three ways: it decays after the update instead of before (a difference of
lr^2 wd), it divides and takes powers approximately, and it moves a negative first moment that is nearest to zero
to the smallest negative entry (5.5e-7 of the block's largest). Its CPU code searches a coarse grid and does not
always find the nearest entry; its Triton code and its torch definition do as this file does.

All parameters of a step go through one launch, which finds its own by a table of addresses: 448 launches (r = 16
on a 7B model) kept the host of an H100 busy for 43 ms, one for 14 ms.

shapes  p, grad, m and v of N elements, contiguous, in any shape; G = ceil(N / 256) blocks
units   m and v are uint8 codes; absmax in units of the gradient and its square; step counts from 1
raises  ValueError if the tensors do not fit; TypeError for a parameter that is not float32 or a 16-bit float
source  Dettmers et al. 2022, arXiv:2110.02861; bitsandbytes 0.50, block 256, signed and unsigned dynamic map
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .scales8 import BLOCK8, dequantize8, dynamic_map, midpoints, quantize8
from .twin import path_of

CHUNK = 2**20  # elements at a time in the torch definition: bounds its temporaries
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # p, grad, m, v, absmax of m, absmax of v


@functools.lru_cache(maxsize=32)
def tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernel reads: the signed map and its 255 midpoints, then the unsigned ones."""
    signed, unsigned = dynamic_map(True, device), dynamic_map(False, device)
    return signed, midpoints(signed), unsigned, midpoints(unsigned)


def num_blocks(numel: int) -> int:
    return -(-numel // BLOCK8)


def factors(
    *, lr: float, betas: tuple[float, float], weight_decay: float, step: int
) -> tuple[float, float, float]:
    """What p is kept by, the rate of the corrected first moment, and what sqrt(v) is multiplied by."""
    keep = 1.0 - lr * weight_decay
    return keep, lr / (1.0 - betas[0] ** step), 1.0 / math.sqrt(1.0 - betas[1] ** step)


def adamw8(
    operands: Sequence[Operands],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Move parameters of one device and their moments in place: by the kernel on a GPU, else by the definition."""
    for each in operands:
        check8(*each)
    if not operands:
        return
    factor = factors(lr=lr, betas=betas, weight_decay=weight_decay, step=step)
    if path_of(operands[0][0].device)[0] == "torch":
        for each in operands:
            adamw8_reference(*each, betas=betas, eps=eps, factor=factor)
        return
    from .adamw8_triton import launch

    scalars = (betas[0], 1.0 - betas[0], betas[1], 1.0 - betas[1], *factor, eps)
    kinds: dict[tuple[torch.dtype, torch.dtype], list[Operands]] = {}
    for each in operands:
        kinds.setdefault((each[0].dtype, each[1].dtype), []).append(each)
    for same in kinds.values():
        launch(same, tables(same[0][0].device), scalars)


def adamw8_reference(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    m_absmax_G: Tensor,
    v_absmax_G: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    factor: tuple[float, float, float],
) -> None:
    """One parameter and its moments, in place: the definition. `factor` is what `factors` gives."""
    map_s, map_u = dynamic_map(True, p.device), dynamic_map(False, p.device)
    keep, rate, correct = factor
    p_N, grad_N, m_N, v_N = p.view(-1), grad.view(-1), m.view(-1), v.view(-1)
    for start in range(0, p_N.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        blocks = slice(start // BLOCK8, (start + CHUNK) // BLOCK8)
        g = grad_N[part].float()
        new_m = dequantize8(m_N[part], m_absmax_G[blocks], map_s).mul_(betas[0])
        new_v = dequantize8(v_N[part], v_absmax_G[blocks], map_u).mul_(betas[1])
        new_m.add_(g * (1.0 - betas[0]))
        new_v.add_((g * g).mul_(1.0 - betas[1]))
        root = new_v.double().sqrt_().float()  # torch's own float32 root on a CPU is not correctly rounded
        move = (new_m / root.mul_(correct).add_(eps)).mul_(rate)
        p_N[part] = p_N[part].float().mul(keep).sub_(move).to(p.dtype)
        m_N[part], m_absmax_G[blocks] = quantize8(new_m, map_s)
        v_N[part], v_absmax_G[blocks] = quantize8(new_v, map_u)


def check8(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, m_absmax_G: Tensor, v_absmax_G: Tensor) -> None:
    if p.dtype not in DTYPES or grad.dtype not in DTYPES:
        raise TypeError(f"8-bit AdamW moves float32 and 16-bit floats, not {p.dtype} by {grad.dtype}")
    if m.dtype != torch.uint8 or v.dtype != torch.uint8:
        raise TypeError(f"8-bit moments are uint8, not {m.dtype} and {v.dtype}")
    n, every = p.numel(), (p, grad, m, v, m_absmax_G, v_absmax_G)
    sizes = [t.numel() for t in every]
    if sizes != [n, n, n, n, num_blocks(n), num_blocks(n)]:
        raise ValueError(f"{n:,} elements need {num_blocks(n):,} scales; the tensors have {sizes} elements")
    if not all(t.is_contiguous() for t in every):
        raise ValueError("8-bit AdamW works on contiguous tensors")


def cases(device: torch.device) -> Iterator[tuple[list[Operands], dict[str, Any]]]:
    """What the twin test runs: one element, short blocks, a block without gradient, every dtype, a late step."""
    generator = torch.Generator().manual_seed(0)
    for step in (1, 1000):
        operands: list[Operands] = []
        for dtype in DTYPES:
            for n in (1, 256, 1000, 1025):
                scale = torch.randn(2, n, generator=generator).exp()
                p, grad = (torch.randn(2, n, generator=generator) * scale).to(dtype)
                grad[256:512] = 0
                m, v = torch.randint(32, 256, (2, n), generator=generator).to(torch.uint8)
                absmax = torch.rand(2, num_blocks(n), generator=generator) * (step > 1)
                p, grad, m, v, first, second = (t.to(device).clone() for t in (p, grad, m, v, *absmax))
                operands.append((p, grad, m, v, first, second))
        yield operands, {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "step": step}
