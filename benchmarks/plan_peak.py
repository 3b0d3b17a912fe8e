"""Predicted against measured peaks of training steps on a GPU: what `loraloom plan` is held to.

    python benchmarks/plan_peak.py [--only NAME ...] [--skip NAME ...] [--out FILE]

For each setting the peak is predicted on the meta device; then a model of that shape with random weights is made on
the GPU, two real optimizer steps run, and torch.cuda.max_memory_allocated of both is read. Settings named `frozen`
were chosen after the constants in memory.py and sdpa.py were; the others are what these were set by. The results go
to benchmarks/results/plan_peak.json after each setting. Nothing is downloaded.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from command_line import command_line

from loraloom.adapt import Adapters
from loraloom.config import RunConfig, resolve
from loraloom.environment import commit
from loraloom.incoming import quantize_model
from loraloom.kernels.matmul_frozen import release_buffers
from loraloom.memory import CUBLAS, Predictor, tier
from loraloom.model import own_attention, settle_attention
from loraloom.optim import make_optimizer
from loraloom.packing import Batch
from loraloom.products8 import use_fp8
from loraloom.recompute import apply, fuse
from loraloom.shapes import published
from loraloom.step import train_step
from loraloom.workload import Assumed
from loraloom.workshop import spec_of

OUT = Path(__file__).parent / "results" / "plan_peak.json"


@dataclass(frozen=True)
class Setting:
    """One model and one batch; `rows` of `length` tokens."""

    shape: str
    rows: int
    length: int
    changes: dict[str, Any] = field(default_factory=dict)
    packing: bool = True
    passes: int = 1  # micro-batches of a step
    frozen: bool = False

    @property
    def name(self) -> str:
        about = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.changes.items())
        packed = "packed" if self.packing else "plain"
        return f"{self.shape}-{self.rows}x{self.length}x{self.passes}-{packed}" + (
            f"-{about}" if about else ""
        )

    def config(self) -> RunConfig:
        settings = {"model": self.shape, "data": "none", "output": "none", "model.dtype": "bfloat16"}
        return resolve(None, settings | self.changes)[0]

    def batches(self) -> list[Batch]:
        work = Assumed(self.length, self.length, self.packing, self.rows * self.length)
        return work.batches(self.rows * self.length)[:1] * self.passes


FULL, NF4 = {"train.recompute": "full"}, {"model.quantize": "nf4"}
GATE_UP, OFFLOAD = {"train.recompute": "gate_up"}, {"train.recompute": "offload"}
SETTINGS = [
    # what the constants are set by
    Setting("llama3.2-1b", 4, 2048),
    Setting("llama3.2-1b", 4, 2048, packing=False),
    Setting("llama3.2-1b", 1, 1024, packing=False),
    Setting("llama2-7b", 2, 2048, packing=False),
    Setting("llama2-7b", 4, 2048, FULL, packing=False),
    Setting("llama2-7b", 4, 2048, {**FULL, **NF4}),
    # held out
    Setting("llama3.2-1b", 1, 16384, {"r": 8}, packing=False, frozen=True),
    Setting("llama3.2-1b", 8, 1024, {"r": 256}, passes=2, frozen=True),
    Setting("llama3.2-3b", 2, 4096, {"r": 64}, frozen=True),
    Setting("llama3.2-3b", 1, 8192, {"r": 16, **NF4}, packing=False, frozen=True),
    Setting("llama2-7b", 1, 1024, {"r": 256}, packing=False, frozen=True),
    Setting("llama2-7b", 4, 1024, {"r": 16, **NF4}, passes=2, frozen=True),
    Setting("llama2-7b", 1, 16384, {"r": 8, **FULL}, packing=False, frozen=True),
    Setting("llama3-8b", 2, 2048, {"r": 32}, packing=False, frozen=True),
    Setting("llama3-8b", 4, 2048, {"r": 16, **FULL, **NF4}, frozen=True),
    Setting("llama2-13b", 1, 4096, {"r": 16, **FULL}, frozen=True),
    Setting("llama2-13b", 2, 1024, {"r": 128, **NF4, "train.optimizer": "adamw8bit"}, frozen=True),
    Setting("llama2-7b", 4, 2048, {"r": 16, **GATE_UP}, frozen=True),
    Setting("llama2-7b", 4, 2048, {"r": 16, **OFFLOAD, **NF4}, frozen=True),
    Setting("llama3-8b", 1, 8192, {"r": 16, **OFFLOAD}, packing=False, frozen=True),
]


def on_gpu(setting: Setting) -> tuple[Any, Adapters, Any]:
    """A model with random weights on the GPU, its adapter and its optimizer, as a run would have them."""
    config, device = setting.config(), torch.device("cuda")
    torch.manual_seed(0)
    with device:
        model: Any = transformers.AutoModelForCausalLM.from_config(
            published(setting.shape),
            dtype=torch.bfloat16,
            attn_implementation=own_attention(config.model.attention),
        )
    model.requires_grad_(False).eval()
    m = config.model
    settle_attention(model, m.attention, device, torch.bfloat16)
    if m.quantize != "none":
        quantize_model(model, m.quantize, block=m.quant_block, double=m.double_quant)
        use_fp8(model, m.fp8, device)
    adapters = Adapters(model)
    adapters.add("default", spec_of(config))
    fuse(adapters, config.train, gpu=True)
    apply(model, adapters, tier(config))
    adapters.train()
    return model, adapters, make_optimizer(adapters.groups(1e-4), config.train)


def measure(setting: Setting) -> dict[str, Any]:
    """The peaks of two steps; the second one has the optimizer's state."""
    model, adapters, optimizer = on_gpu(setting)
    gc.collect()
    release_buffers()
    torch.cuda.empty_cache()
    after_load = torch.cuda.memory_allocated()
    batches, peaks, norms = setting.batches(), [], []
    for step in range(2):
        torch.cuda.reset_peak_memory_stats()
        stats = train_step(model, adapters, optimizer, batches, step=step, num_steps=2, max_norm=1.0)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
        norms.append(stats.grad_norm)
    assert all(norm > 0 for norm in norms), norms
    free, total = torch.cuda.mem_get_info()
    return {
        "loaded": after_load,
        "first": peaks[0],
        "measured": peaks[1],
        "reserved": torch.cuda.max_memory_reserved(),
        "in_use": total - free,  # with the context, of this process alone on the GPU
        "left_after": torch.cuda.memory_allocated(),
    }


def compare(setting: Setting) -> dict[str, Any]:
    began = time.perf_counter()
    cudnn = torch.cuda.get_device_capability()[0] >= 9
    found = Predictor(setting.config(), published(setting.shape), cudnn=cudnn).predict(setting.batches())
    seconds = time.perf_counter() - began
    record = {
        "setting": setting.name,
        "frozen": setting.frozen,
        "predicted": found.allocated,
        "needed": found.needed,
        "phase": found.phase,
        "parts": found.parts,
        "phases": found.phases,
        "predict_seconds": round(seconds, 2),
    }
    try:
        record |= measure(setting)
        record["error"] = record["predicted"] / record["measured"] - 1
    except torch.OutOfMemoryError as error:
        record["failed"] = str(error).splitlines()[0]
    release_buffers()
    return record


def attention_kernels() -> dict[str, str]:
    """Which attention torch takes here for bf16, without and with a mask."""
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
    q = torch.zeros(1, 4, 256, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mask = torch.zeros(1, 1, 256, 256, device="cuda", dtype=torch.bfloat16)
    return {
        "causal": names.get(int(torch._fused_sdp_choice(q, q, q, is_causal=True)), "?"),
        "masked": names.get(int(torch._fused_sdp_choice(q, q, q, mask)), "?"),
    }


def workspaces() -> Iterator[dict[str, Any]]:
    """What the attention takes beside its results, in float32 numbers of q: what sdpa.Kernel is set by."""
    for heads, shared, length in ((32, 32, 2048), (32, 8, 2048), (32, 32, 8192)):
        for masked in (False, True):
            kv = heads if masked else shared
            shapes = [(1, n, length, 128) for n in (heads, kv, kv)]
            q, k, v = (
                torch.zeros(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes
            )
            mask = torch.zeros(1, 1, length, length, device="cuda", dtype=torch.bfloat16) if masked else None
            attend = torch.nn.functional.scaled_dot_product_attention
            before = torch.cuda.memory_allocated()
            out = attend(q, k, v, mask, is_causal=not masked, enable_gqa=kv != heads)
            saved = torch.cuda.memory_allocated() - before
            grad = torch.ones_like(out)
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            out.backward(grad)
            results = 2 * (q.numel() + k.numel() + v.numel())
            extra = torch.cuda.max_memory_allocated() - held - results
            yield {
                "heads": heads,
                "kv": kv,
                "length": length,
                "masked": masked,
                "saved_beyond_out": saved - 2 * q.numel(),
                "workspace": extra,
                "workspace_per_q": extra / (4 * q.numel()),
                "workspace_per_row": extra / (4 * heads * length),
            }


def about_machine() -> dict[str, Any]:
    before = torch.cuda.memory_allocated()
    a = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    (a @ a).sum().item()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "attention": attention_kernels(),
        "cublas_one_thread": torch.cuda.memory_allocated() - before - a.numel() * 2,
        "cublas_assumed": CUBLAS,
        "workspaces": list(workspaces()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of settings to run")
    parser.add_argument("--skip", nargs="*", default=[], help="parts of names of settings to leave out")
    parser.add_argument("--commit", default="", help="where there is no repository to ask")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    chosen = [
        setting
        for setting in SETTINGS
        if (not options.only or any(part in setting.name for part in options.only))
        and not any(part in setting.name for part in options.skip)
    ]
    command = command_line()
    results: dict[str, Any] = {"command": command, "commit": options.commit or commit() or ""}
    results |= {"machine": about_machine(), "settings": []}
    for setting in chosen:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        record = compare(setting)
        results["settings"].append(record)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        measured = record.get("measured")
        told = f"{measured / 1e9:8.2f} GB  {record['error']:+.1%}" if measured else record.get("failed", "")
        print(f"{setting.name:<70} {record['predicted'] / 1e9:8.2f} GB  {told}", flush=True)


if __name__ == "__main__":
    main()
