"""The 4-bit and 8-bit kernels on a GPU beside bitsandbytes': bytes a second, and how many bits differ.

    python benchmarks/quant4_kernels.py
    python benchmarks/quant4_kernels.py --tiles     other tile sizes too; printed, and written nowhere

One matrix of 28672 x 8192 (Llama-2-70B's MLP) in blocks of 64, its scales in 8 bits; bytes count what is read and
written once. Bits are counted over 16.8M random weights of each dtype. bitsandbytes is optional; without it its
rows are left out. Written to benchmarks/results/quant4_kernels.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import triton
from command_line import command_line

from loraloom.kernels import fp8_triton, quant4_triton
from loraloom.kernels.fp8 import matmul8, quantize_rows, turn8
from loraloom.kernels.quant4 import channel_scale, dequantize4, dequantize4_fp8, quantize4, quantize_scales
from loraloom.weights8 import encode8

ROOT = Path(__file__).parents[1]
O, I = 28672, 8192
FORM: dict[str, Any] = {"table": "nf4", "shape": (O, I), "block": 64}
CODED = 0.5 + 1 / 64  # bytes a weight, of codes and scales in 8 bits
TOKENS = 8192


def speed(run: Callable[[], object], bytes_a_weight: float) -> dict[str, float]:
    ms = triton.testing.do_bench(run, return_mode="median")
    return {"ms": ms, "tb_per_s": O * I * bytes_a_weight / ms * 1e-9}


def speeds(device: str) -> dict[str, dict[str, float]]:
    w_OI = torch.randn(O, I, device=device, dtype=torch.bfloat16) * 0.02
    packed_H, absmax_G = quantize4(w_OI, table="nf4")
    scales = quantize_scales(absmax_G)
    wide = torch.empty(O * I, dtype=torch.bfloat16, device=device)
    narrow = torch.empty(O * I, dtype=torch.float8_e4m3fn, device=device)
    rows, columns = (channel_scale(packed_H, scales, **FORM, dim=dim) for dim in (0, 1))
    found = {
        "copy, bf16": speed(lambda: wide.copy_(w_OI.view(-1)), 4),
        "quantise": speed(lambda: quantize4(w_OI, table="nf4"), 2 + 0.5 + 4 / 64),
        "to bf16": speed(
            lambda: dequantize4(packed_H, scales, **FORM, dtype=torch.bfloat16, out=wide), CODED + 2
        ),
        "to fp8": speed(lambda: dequantize4_fp8(packed_H, scales, rows, **FORM, out=narrow), CODED + 1),
        "to fp8, transposed": speed(
            lambda: dequantize4_fp8(packed_H, scales, columns, **FORM, transposed=True, out=narrow), CODED + 1
        ),
    }
    found |= speeds8(w_OI, narrow)
    if find_spec("bitsandbytes"):
        import bitsandbytes.functional as bnb

        packed, state = bnb.quantize_4bit(w_OI, quant_type="nf4", compress_statistics=True)
        found["bitsandbytes to bf16"] = speed(lambda: bnb.dequantize_4bit(packed, state), CODED + 2)
    return found


def speeds8(w_OI: torch.Tensor, narrow: torch.Tensor) -> dict[str, dict[str, float]]:
    """What a base in 8 bits and its products take."""
    codes = encode8(w_OI).with_channels()
    x_TI = torch.randn(TOKENS, I, device=w_OI.device, dtype=torch.bfloat16)
    rows, columns = quantize_rows(x_TI), codes.both[1]
    found = {
        "rows to fp8": speed(lambda: quantize_rows(w_OI), 2 + 1),
        "fp8, transposed": speed(lambda: turn8(codes.codes, codes.scale, columns, narrow), 1 + 1),
    }
    for name, run in (
        ("product in bf16", lambda: x_TI @ w_OI.T),
        ("product in fp8", lambda: matmul8(rows, codes.codes, codes.scale, torch.bfloat16)),
    ):
        ms = triton.testing.do_bench(run, return_mode="median")
        found[name] = {"ms": ms, "tflop_per_s": 2 * TOKENS * O * I / ms * 1e-9}
    return found


def tiles(device: str) -> None:
    """Prints the speed of every schedule that is worth a try; bits do not depend on them."""
    w_OI = torch.randn(O, I, device=device, dtype=torch.bfloat16) * 0.02
    packed_H, absmax_G = quantize4(w_OI, table="nf4")
    scales, codes = quantize_scales(absmax_G), encode8(w_OI).with_channels()
    wide = torch.empty(O * I, dtype=torch.bfloat16, device=device)
    narrow = torch.empty(O * I, dtype=torch.float8_e4m3fn, device=device)
    rows, columns = (channel_scale(packed_H, scales, **FORM, dim=dim) for dim in (0, 1))
    for flat, line, warps in (
        (2048, 1024, 4),
        (4096, 1024, 4),
        (4096, 512, 4),
        (4096, 4096, 4),
        (8192, 1024, 8),
    ):
        quant4_triton.FLAT, quant4_triton.LINE, quant4_triton.WARPS = flat, line, warps
        told = speed(lambda: dequantize4(packed_H, scales, **FORM, dtype=wide.dtype, out=wide), CODED + 2)
        show(f"to bf16, {flat} weights, {warps} warps", told)
        told = speed(lambda: dequantize4_fp8(packed_H, scales, rows, **FORM, out=narrow), CODED + 1)
        show(f"to fp8, {flat} weights, {line} of a row, {warps} warps", told)
    for height, width, warps in (
        (64, 128, 4),
        (128, 64, 4),
        (128, 128, 4),
        (128, 128, 8),
        (64, 64, 4),
        (64, 256, 8),
    ):
        quant4_triton.ROWS, quant4_triton.COLS, quant4_triton.TURNING = height, width, warps
        form = {**FORM, "transposed": True, "out": narrow}
        told = speed(lambda form=form: dequantize4_fp8(packed_H, scales, columns, **form), CODED + 1)
        show(f"to fp8, transposed, {height} x {width}, {warps} warps", told)
        fp8_triton.ROWS, fp8_triton.COLS = height, width
        told = speed(lambda: turn8(codes.codes, codes.scale, codes.both[1], narrow), 2)
        show(f"fp8, transposed, {height} x {width}", told)


def show(name: str, row: dict[str, float]) -> None:
    rate = f"{row['tb_per_s']:.2f} TB/s" if "tb_per_s" in row else f"{row['tflop_per_s']:.0f} TFLOP/s"
    print(f"{name:<50} {row['ms']:.3f} ms  {rate}", flush=True)


def bits(device: str, n: int = 4096 * 4096) -> dict[str, dict[str, int]]:
    """How many bytes and numbers differ from bitsandbytes'."""
    import bitsandbytes.functional as bnb

    found = {}
    for name in ("nf4", "fp4"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            w = (torch.randn(n, device=device) * 0.02).to(dtype)
            theirs, state = bnb.quantize_4bit(w, quant_type=name, compress_statistics=True)
            packed_H, absmax_G = quantize4(w, table=name)
            scales = quantize_scales(absmax_G)
            back = dequantize4(packed_H, scales, table=name, shape=(n,), block=64, dtype=dtype)
            found[f"{name} {str(dtype).removeprefix('torch.')}"] = {
                "weights": n,
                "bytes": int((packed_H != theirs.view(-1)).sum()),
                "scales": int((scales.code_G != state.absmax).sum()),
                "numbers": int((back != bnb.dequantize_4bit(theirs, state)).sum()),
            }
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--commit", default="", help="where there is no repository to ask")
    p.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "quant4_kernels.json"))
    p.add_argument("--tiles", action="store_true", help="try other tile sizes")
    a = p.parse_args()
    if a.tiles:
        tiles("cuda")
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    torch.manual_seed(0)
    record = {
        "command": command_line(),
        "commit": a.commit or commit.stdout.strip(),
        "machine": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton", "loraloom")},
        "speeds": speeds("cuda"),
        "differ": bits("cuda") if find_spec("bitsandbytes") else None,
    }
    Path(a.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name, row in record["speeds"].items():
        show(name, row)
    print(json.dumps(record["differ"]))


if __name__ == "__main__":
    main()
