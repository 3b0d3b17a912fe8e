"""Shared memory that kernels of fused layers take, compiled for GPUs that this machine need not have.

python tests/kernel_room.py        a line for each: kernel, GPU, bytes it takes, bytes the GPU has
"""

from __future__ import annotations

import inspect
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraloom.kernels import block_mlp_triton as mlp
from loraloom.kernels import block_rope_triton as turn

HAS = {75: 64 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # bytes of a block, by compute capability
NUMBERS = ("tokens", "stride", "cos_stride")


def takes(kernel: Any, capability: int, kind: str, fixed: dict[str, Any]) -> int:
    """Bytes of shared memory, with `fixed` for what is known when a kernel is compiled."""
    fixed = dict(fixed)
    warps = fixed.pop("num_warps")
    names = list(inspect.signature(kernel.fn).parameters)
    types = {
        name: "constexpr"
        if name in fixed
        else "i32"
        if name in NUMBERS
        else "*fp32"
        if name in ("db_ptr", "da_ptr")
        else kind
        for name in names
    }
    known = {(names.index(name),): value for name, value in fixed.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name not in fixed}
    source = ASTSource(fn=kernel, signature=types, constexprs=known, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return int(made.metadata.shared)


def main() -> None:
    grad = {"F": 11008, "SILU": True, "KEEP": True, "STEPS": 8}
    wide = {"R": 64, "RD": 64}
    rope = {"TURNED": 64, "R": 64, "HEADS": 8} | turn.FORWARD
    whole = {"D": 128, "E2": 64, "P2": 64, "PR": 0}  # heads as wide as loads ahead are taken for
    broad = {"D": 256, "E2": 128, "P2": 128, "PR": 0, "STAGES": 1}  # Gemma's
    part = {"D": 256, "E2": 32, "P2": 32, "PR": 256, "STAGES": 1}
    cases: list[tuple[Any, int, str, dict[str, Any]]] = [
        (mlp._swiglu_grad, 86, "*bf16", grad | wide | mlp.GRAD_64),
        (mlp._swiglu_grad, 90, "*fp32", grad | wide | mlp.GRAD_64),
        (mlp._swiglu_grad, 75, "*fp32", grad | wide | mlp.SMALL),
        (turn._rope, 86, "*bf16", rope | whole),
        (turn._rope, 90, "*fp32", rope | whole),
        (turn._rope, 86, "*bf16", rope | broad),
        (turn._rope, 86, "*fp32", rope | part),
    ]
    for kernel, capability, kind, fixed in cases:
        print(kernel.fn.__name__, capability, takes(kernel, capability, kind, fixed), HAS[capability])


if __name__ == "__main__":
    main()
