"""Attention within documents on a GPU: milliseconds of each kernel by the documents' length, and their errors.

    python benchmarks/attention_kernels.py
    python benchmarks/attention_kernels.py --tiles              other tiles of the short kernel too; written nowhere
    python benchmarks/attention_kernels.py --tiles --compile 0/8    build the first eighth of those, and end

16,384 tokens in bf16 at the heads of Llama-2-7B, Llama-3-8B and Llama-3.2-1B; documents of one length, and lengths like
Alpaca's. Errors are to float64 over 2,048 tokens of such lengths, as shares of the largest number.
The rates of kernels/attention_plan.py are taken from benchmarks/results/attention_kernels.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import triton
from alpaca_run import lengths as alpaca_lengths
from command_line import command_line
from torch import Tensor

from loraloom.kernels import attention, attention_short_triton
from loraloom.kernels.attention_short import short
from loraloom.packing import bounds_of

ROOT = Path(__file__).parents[1]
TOKENS = 16384
HEADS = {"7B": (32, 32, 128), "8B": (32, 8, 128), "1B": (32, 8, 64)}
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
KINDS = ("varlen", "dense", "short")
WALKS = ((64, 32, 4, 3), (64, 32, 4, 2), (64, 32, 4, 4), (64, 16, 4, 4), (32, 32, 4, 3), (32, 32, 2, 3))
WALKS += ((64, 32, 8, 3), (128, 32, 8, 4), (64, 64, 4, 2))
KEYS = ((32, 64, 4, 3), (32, 64, 4, 2), (32, 64, 4, 4), (16, 64, 4, 4), (32, 32, 4, 3), (32, 32, 2, 3))
KEYS += ((32, 128, 8, 2), (16, 128, 8, 3), (64, 64, 4, 3), (32, 64, 8, 3))
NAMES = ("BM", "BN", "num_warps", "num_stages")
TILES = {"FORWARD": WALKS, "QUERIES": WALKS, "KEYS": KEYS}


def alpaca(tokens: int) -> list[int]:
    """Lengths like Alpaca's that fill the tokens."""
    found = alpaca_lengths(tokens // 16, seed=3)
    count = next(i for i, total in enumerate(accumulate(found)) if total >= tokens)
    return [*found[:count], tokens - sum(found[:count])]


class Case:
    """q, k and v as views of one buffer, and the documents."""

    def __init__(self, heads: tuple[int, int, int], lengths: list[int]) -> None:
        self.lengths, (count, groups, width) = lengths, heads
        tokens = sum(lengths)
        whole = torch.randn(tokens, (count + 2 * groups) * width, device="cuda", dtype=torch.bfloat16)
        parts = whole.split([count * width, groups * width, groups * width], dim=1)
        self.qkv = [part.unflatten(1, (-1, width)).requires_grad_() for part in parts]
        self.dout = torch.randn(tokens, count, width, device="cuda", dtype=torch.bfloat16)
        self.starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
        self.bounds = bounds_of(self.starts, tokens)
        self.scale = width**-0.5

    def run(self, kind: str, *qkv: Tensor) -> Tensor:
        q, k, v = qkv or self.qkv
        if kind == "varlen":
            return attention.varlen(q, k, v, self.starts, max(self.lengths))
        if kind == "dense":
            return attention.dense(q, k, v, len(self.lengths))
        if kind == "exact":
            return attention.one_by_one(q, k, v, self.lengths)
        return short(q, k, v, self.bounds, self.scale, None)

    def milliseconds(self, kind: str) -> dict[str, float]:
        out = self.run(kind)
        with torch.no_grad():
            forward = timed(lambda: self.run(kind))
        backward = timed(lambda: torch.autograd.grad(out, self.qkv, self.dout, retain_graph=True))
        return {"forward_ms": forward, "backward_ms": backward}

    def errors(self) -> dict[str, list[float]]:
        """Of the result, dq, dk and dv."""

        def both(kind: str, dtype: torch.dtype) -> list[Tensor]:
            qkv = [x.detach().to(dtype).requires_grad_() for x in self.qkv]
            out = self.run(kind, *qkv)
            return [out.detach(), *torch.autograd.grad(out, qkv, self.dout.to(dtype))]

        exact = both("exact", torch.float64)
        return {
            kind: [
                float((x.double() - e).abs().max() / e.abs().max())
                for x, e in zip(both(kind, torch.bfloat16), exact, strict=True)
            ]
            for kind in ("varlen", "short")
        }


def timed(run: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(run, warmup=5, rep=25, return_mode="median"))


def rows(names: list[str]) -> list[dict[str, Any]]:
    found = []
    for name, heads in [(name, HEADS[name]) for name in names]:
        for length in (*LENGTHS, None):
            lengths = alpaca(TOKENS) if length is None else [length] * (TOKENS // length)
            case = Case(heads, lengths)
            for kind in KINDS:
                if kind == "dense" and length is None:
                    continue
                ms = case.milliseconds(kind)
                row = {"heads": name, "length": length or "alpaca", "kind": kind, **ms}
                flops = 2 * sum(n * n for n in lengths) * heads[0] * heads[2]
                row["tflop_per_s"] = [
                    round(flops * times / ms[part] * 1e-9, 1)
                    for part, times in (("forward_ms", 1), ("backward_ms", 2.5))
                ]
                print(json.dumps(row), flush=True)
                found.append(row)
    return found


def tiles(part: str | None) -> None:
    """Milliseconds of each of the three kernels with other tiles, one changed at a time."""
    every = [
        (name, kernel, dict(zip(NAMES, tile)))
        for name in ("7B", "1B")
        for kernel, tiles in TILES.items()
        for tile in tiles
    ]
    if part is not None:
        index, count = map(int, part.split("/"))
        every = every[index::count]
    for name in ("7B", "1B"):
        case = Case(HEADS[name], alpaca(TOKENS))
        for _, kernel, tile in [one for one in every if one[0] == name]:
            before = getattr(attention_short_triton, kernel)
            setattr(attention_short_triton, kernel, tile)
            try:
                if part is not None:
                    torch.autograd.grad(case.run("short"), case.qkv, case.dout)
                else:
                    print(name, kernel, *tile.values(), show(case.milliseconds("short")), flush=True)
            except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
                print(name, kernel, *tile.values(), str(error).splitlines()[0][:90])
            setattr(attention_short_triton, kernel, before)


def show(ms: dict[str, float]) -> str:
    return f"{ms['forward_ms']:.3f} {ms['backward_ms']:.3f}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--commit", default="", help="where there is no repository to ask")
    p.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "attention_kernels.json"))
    p.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    p.add_argument("--tiles", action="store_true", help="try other tiles")
    p.add_argument("--compile", help="with --tiles: a share of them, such as 0/8, only built")
    a = p.parse_args()
    torch.manual_seed(0)
    if a.tiles:
        tiles(a.compile)
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    record = {
        "command": command_line(),
        "commit": a.commit or commit.stdout.strip(),
        "machine": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton")},
        "tokens": TOKENS,
        "errors": {name: Case(HEADS[name], alpaca(2048)).errors() for name in a.heads},
        "rows": rows(a.heads),
    }
    Path(a.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["errors"]))


if __name__ == "__main__":
    main()
