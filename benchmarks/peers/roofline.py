"""The card's ceilings on random data: bf16 and fp8 matrix products, copy bandwidth, bitsandbytes' NF4 kernels.

One JSON line a measurement: median of --reps timings by CUDA events, inputs rotated so that L2 does not hold them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import kit
import loop

REAL = ((8192, 4096, 11008), (8192, 11008, 4096), (8192, 4096, 4096), (8192, 4096, 8), (8192, 4096, 32000))


class Roof:
    """Times operations on one device; the CPU only checks that the code runs."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.cuda = a, a.device == "cuda"

    def rand(self, *shape: int) -> Any:
        import torch

        return torch.randn(shape, device=self.a.device, dtype=torch.bfloat16)

    def ms(self, work: Callable[..., Any], sets: list[Any]) -> float:
        """Median time of work over rotating input sets."""
        import torch

        if not self.cuda:
            began = time.perf_counter()
            work(*sets[0])
            return 1e3 * (time.perf_counter() - began)
        for i in range(5):
            work(*sets[i % len(sets)])
        pairs = []
        for i in range(self.a.reps):
            begin = loop.stamp(True)
            work(*sets[i % len(sets)])
            pairs.append((begin, loop.stamp(True)))
        torch.cuda.synchronize()
        return statistics.median(x.elapsed_time(y) for x, y in pairs)

    def out(self, what: str, ms: float, **more: float) -> None:
        import torch

        device = torch.cuda.get_device_name() if self.cuda else "cpu"
        line = {
            "peer": "roofline",
            "what": what,
            "ms": round(ms, 4),
            "device": device,
            "torch": torch.__version__,
        }
        print(json.dumps(line | {k: round(v, 2) for k, v in more.items()}), flush=True)

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """A measurement that a machine may not be able to make."""
        try:
            work()
        except Exception as error:
            words = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            print(json.dumps({"peer": "roofline", "what": what, "error": words}), flush=True)
        loop.clean()

    def matmul_bf16(self) -> None:
        n = self.a.n
        for m, k, o in ((n, n, n), *REAL):
            if not self.cuda:
                m = k = o = 64
            t = self.ms(lambda x, w: x @ w.t(), [(self.rand(m, k), self.rand(o, k)) for _ in range(3)])
            self.out(f"bf16 matmul x[{m},{k}] @ w[{o},{k}].T", t, tflops=2e-9 * m * k * o / t)
        m, k, o = (2048, 11008, 4096) if self.cuda else (64, 64, 64)
        t = self.ms(lambda g, w: g @ w, [(self.rand(m, k), self.rand(k, o)) for _ in range(3)])  # dX = dY W
        self.out(f"bf16 matmul dY[{m},{k}] @ W[{k},{o}]", t, tflops=2e-9 * m * k * o / t)

    def copy_bandwidth(self) -> None:
        import torch

        size = (1 << 31) if self.cuda else 1 << 20
        x = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.a.device)
        y = torch.empty_like(x)
        t = self.ms(lambda: y.copy_(x), [()])
        self.out(f"device copy {size >> 20} MiB", t, gb_per_s_read_plus_write=2e-6 * size / t)

    def fp8(self) -> None:
        import torch

        one = torch.ones((), device=self.a.device)
        for m, k, o in ((self.a.n, self.a.n, self.a.n), (8192, 4096, 11008), (8192, 4096, 4096)):
            sets = [[self.rand(*s).to(torch.float8_e4m3fn) for s in ((m, k), (o, k))] for _ in range(3)]
            rows, columns = (torch.rand(*s, device=self.a.device) for s in ((m, 1), (1, o)))
            for kind, sx, sw in (("tensorwise", one, one), ("rowwise", rows, columns)):
                for fast in (False, True):
                    given = {
                        "scale_a": sx,
                        "scale_b": sw,
                        "out_dtype": torch.bfloat16,
                        "use_fast_accum": fast,
                    }
                    name = f"fp8 e4m3 {kind}{' fast_accum' if fast else ''} x[{m},{k}] @ w[{o},{k}].T"
                    self.attempt(name, partial(self.fp8_one, name, sets, given, m * k * o))

    def fp8_one(self, name: str, sets: list[Any], given: dict[str, Any], products: int) -> None:
        import torch

        t = self.ms(lambda x, w: torch._scaled_mm(x, w.t(), **given), sets)
        self.out(name, t, tflops=2e-9 * products / t)

    def nf4(self) -> None:
        for o, k in ((11008, 4096), (4096, 4096)) if self.cuda else ((128, 256),):
            self.nf4_one(o, k)

    def nf4_one(self, o: int, k: int) -> None:
        import bitsandbytes as bnb
        import bitsandbytes.functional as F

        def quantise(w: Any, double: bool = True) -> Any:
            return F.quantize_4bit(w, quant_type="nf4", compress_statistics=double)

        w, x = self.rand(o, k), self.rand(8192 if self.cuda else 32, k)
        for double in (False, True):
            sets = [quantise(self.rand(o, k), double) for _ in range(4)]
            t = self.ms(F.dequantize_4bit, sets)
            words = f"bitsandbytes {bnb.__version__} nf4 dequant{', double quant' if double else ''}"
            held = 2 + 0.5 + (1 if double else 4) / 64
            self.out(f"{words}, {o}x{k}", t, gb_per_s=1e-6 * o * k * held / t)
        self.out(f"bitsandbytes nf4 quantise, {o}x{k}", self.ms(quantise, [(w,)]))
        t = self.ms(lambda q, state: bnb.matmul_4bit(x, q.t(), quant_state=state), sets)
        flops = 2e-9 * x.shape[0] * k * o / t
        self.out(f"bitsandbytes matmul_4bit x[{x.shape[0]},{k}], nf4 {o}x{k}", t, tflops=flops)

    def sdpa(self) -> None:
        from torch.nn.attention import SDPBackend

        for backend in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        ):
            self.attempt(f"sdpa {backend.name}", partial(self.sdpa_one, backend))

    def sdpa_one(self, backend: Any) -> None:
        import torch
        from torch.nn.attention import sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        b, h, s, d = (4, 32, 2048, 128) if self.cuda else (1, 2, 64, 32)
        q, k, v = (self.rand(b, h, s, d).requires_grad_() for _ in range(3))
        g = self.rand(b, h, s, d)

        def forward() -> Any:
            return scaled_dot_product_attention(q, k, v, is_causal=True)

        with sdpa_kernel(backend):
            ahead = self.ms(forward, [()])
            both = self.ms(lambda: torch.autograd.grad(forward(), (q, k, v), g), [()])
        flops = 2e-9 * b * h * s * s * d  # causal: half of 4 S^2 D
        words = f"sdpa causal {backend.name} B{b} H{h} S{s} D{d}"
        self.out(f"{words} forward", ahead, tflops=flops / ahead)
        self.out(f"{words} forward+backward", both, tflops=3.5 * flops / both)


def main() -> None:
    kit.use_site("base")
    p = argparse.ArgumentParser()
    p.add_argument("--reps", type=int, default=30)
    p.add_argument("--n", type=int, default=8192)
    p.add_argument("--device", default="cuda")
    roof = Roof(p.parse_args())
    for name in ("matmul_bf16", "copy_bandwidth", "fp8", "nf4", "sdpa"):
        roof.attempt(name, getattr(roof, name))


if __name__ == "__main__":
    main()
