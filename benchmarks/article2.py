"""The table of article 2, section 5, on one GPU: LoRA on a base in bf16, NF4 and FP4, with and without double
quantisation: seconds a step, peak memory, loss.

    python benchmarks/article2.py                    one H100: Llama-2-7B shapes, random weights
    python benchmarks/article2.py --shape llama3.2-1b --steps 2 --cpu      to try it

Its settings: r = 8 on q and v, alpha 16, dropout 0.05, AdamW at 3e-4, batch 128, lengths like Alpaca's (log-normal
with a median of 110, 16 to 1,024). The micro-batch is the largest that the planner says fits. Written to
benchmarks/results/article2.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from random_weights import random_model

from loraloom.adapt import Adapters
from loraloom.adapter import AdapterSpec
from loraloom.config import TrainConfig
from loraloom.kernels.twin import path_of
from loraloom.optim import make_optimizer, set_rates
from loraloom.packing import Example, pack
from loraloom.quant import bits_per_parameter, stored_bytes
from loraloom.shapes import published
from loraloom.train import train_step
from loraloom.workshop import checkpoint_layers

ROOT = Path(__file__).parents[1]
BASES = {
    "bf16": None,
    "nf4, double": ("nf4", True),
    "nf4": ("nf4", False),
    "fp4, double": ("fp4", True),
    "fp4": ("fp4", False),
}


def examples(count: int, vocabulary: int, seed: int) -> list[Example]:
    """Random tokens in Alpaca-like lengths; every token but the first carries loss."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(count):
        length = int(min(1024, max(16, math.exp(math.log(110) + 0.6 * torch.randn((), generator=generator).item()))))
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[0] = -100
        made.append(Example(ids.tolist(), labels.tolist(), f"row {row}"))
    return made
