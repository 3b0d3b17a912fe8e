"""Short training steps with and without CUDA graphs: where launches take longer than the work.

    python benchmarks/short_steps.py                     Qwen2-0.5B shapes, bf16, r = 16 on all linears; needs a GPU

Each length is trained for `--seconds`, eager and with train.graphs, by the real training step with fused layers; losses
of the two must agree. Written to benchmarks/results/speed_short_steps.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from command_line import command_line
from random_weights import random_model

from loraloom.adapt import attach
from loraloom.config import TrainConfig
from loraloom.fast import engage
from loraloom.graphs import CudaRecorder, Graphs
from loraloom.model import settle_attention
from loraloom.optim import make_optimizer
from loraloom.packing import batch
from loraloom.skeleton import make_shape
from loraloom.step import accumulate, train_step
from loraloom.workload import Made

OUT = Path(__file__).parent / "results" / "speed_short_steps.json"
SHAPE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def measure(tokens: int, graphed: bool, seconds: float, warmup: int) -> dict[str, Any]:
    """Steps of one packed row with two documents."""
    device = torch.device("cuda")
    model = random_model(make_shape("qwen2", **SHAPE), device=device)
    settle_attention(model, "auto", device, torch.bfloat16)
    adapters = attach(model, r=16)
    layers = engage(adapters)
    adapters.train()
    optimizer = make_optimizer(adapters.groups(1e-4), TrainConfig())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SHAPE["vocab_size"], (tokens,), generator=generator).tolist()
    row = list(enumerate([Made(ids[: tokens // 2]), Made(ids[tokens // 2 :])]))
    made = batch([row], 0, length=tokens)
    graphs = Graphs(CudaRecorder(device), pad_id=0, most=None, strict=True) if graphed else None
    made = (graphs.pad(made) if graphs else made).to(device)
    losses, norms, begun, steps = [], [], 0.0, 0
    while True:
        if steps == warmup:
            torch.cuda.synchronize()
            begun = time.perf_counter()
        stats = train_step(
            model,
            adapters,
            optimizer,
            [made],
            step=steps,
            num_steps=10**6,
            max_norm=1.0,
            backward=graphs or accumulate,
        )
        losses.append(stats.loss)
        norms.append(stats.grad_norm)
        steps += 1
        if steps > warmup and time.perf_counter() - begun > seconds:
            break
    took = (time.perf_counter() - begun) / (steps - warmup)
    adapters.detach()
    return {
        "tokens": tokens,
        "graphs": graphed,
        "step_ms": round(took * 1e3, 3),
        "tokens_per_s": round(tokens / took, 1),
        "loss_at_5": round(losses[5], 5),
        "grad_norm_at_5": round(norms[5], 5),
        "layers": layers,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--tokens", default="128,512,2048")
    p.add_argument("--seconds", type=float, default=3.0)
    p.add_argument("--warmup", type=int, default=10)
    p.add_argument("--commit", default="", help="where there is no repository to ask")
    p.add_argument("--out", default=str(OUT))
    a = p.parse_args()
    lines = []
    for tokens in map(int, a.tokens.split(",")):
        for graphed in (False, True):
            lines.append(measure(tokens, graphed, a.seconds, a.warmup))
            print(json.dumps(lines[-1]), flush=True)
    about = {
        "command": command_line(),
        "commit": a.commit,
        "machine": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton", "transformers")},
        "python": sys.version.split()[0],
    }
    Path(a.out).write_text(json.dumps({**about, "rows": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
