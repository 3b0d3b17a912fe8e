"""Fifty thousand samples of Alpaca-like lengths through `loraloom train`: wall clock and tokens a second.

    python benchmarks/alpaca_run.py --quantize nf4 --out speed_alpaca_nf4.json           one H100, minutes
    python benchmarks/alpaca_run.py --model tiny --samples 60 --device cpu               to try it

A model folder of Llama-2-7B's shape is written with random weights (13.5 GB, kept in --folder), and Alpaca rows of
random words: log-normal lengths, median 110 tokens, sigma 0.6, 16 to 1,024, one token a word, 6.57M tokens in 50,000
rows. All tokens carry loss. Other rows are held out, for the evaluations of a real run. A step's seconds begin before
it asks for its batch, so waiting for data is in them; outside lie evaluations, sampled answers, checkpoints, and what
the command does before and after.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks" / "peers")]
OUT = ROOT / "benchmarks" / "results" / "speed_alpaca_run.json"
GIVEN = dict(os.environ)  # before kit turns the tokenizer's threads off, which a user has on


def lengths(count: int, seed: int) -> list[int]:
    """Tokens of each sample."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    drawn = torch.exp(math.log(110) + 0.6 * torch.randn(count, generator=generator, dtype=torch.float64))
    return drawn.clamp(16, 1024).int().tolist()


def rows(sizes: list[int], vocab: int, seed: int) -> Iterator[dict[str, str]]:
    """Alpaca rows of so many tokens: a third asks, the rest answers, and one token ends the answer."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        words = [f"w{i}" for i in torch.randint(0, vocab, (size - 1,), generator=generator).tolist()]
        asks = size // 3
        # in style `plain` the answer begins where the prompt ends
        yield {"instruction": " ".join(words[:asks]) + " ", "input": "", "output": " ".join(words[asks:])}


def write_data(path: Path, count: int, vocab: int, seed: int) -> int:
    """A jsonl of so many samples; how many tokens they have."""
    sizes = lengths(count, seed)
    with path.open("w", encoding="utf-8") as out:
        for row in rows(sizes, vocab, seed):
            out.write(json.dumps(row) + "\n")
    return sum(sizes)


def write_model(a: argparse.Namespace) -> tuple[Path, int]:
    """The model folder, and how many words its tokenizer knows."""
    import kit
    from random_folder import SPECIAL, word_tokenizer, write_folder

    shape = kit.parse(kit.parser(), ["--model", a.model])
    config = kit.hf_config(shape)
    folder = write_folder(
        Path(a.folder) / f"words-{a.model}", config, device=a.device, tokenizer=word_tokenizer
    )
    return folder, config.vocab_size - len(SPECIAL)


def command(a: argparse.Namespace, model: Path, train: Path, held_out: Path, run: Path) -> list[str]:
    """`loraloom train` with every setting of the run."""
    chosen = {
        "model.device": a.device,
        "model.dtype": "bfloat16",
        "model.quantize": a.quantize,
        "data.eval": str(held_out) if a.held_out else "0",
        "data.prompt": "plain",
        "data.loss_on": "all",
        "data.max_length": "1024",
        "data.duplicates": "keep",
        "r": str(a.rank),
        "target_modules": "all-linear",
        "train.batch_size": str(a.batch),
        "train.early_stop": "null",  # random words cannot be learnt, so no evaluation is better
    }
    flags = [f"--set={key}={value}" for key, value in chosen.items()] + [f"--set={one}" for one in a.set]
    words = [sys.executable, "-m", "loraloom", "train", "-m", str(model), "-d", str(train), "-o", str(run)]
    return [*words, "--offline", *flags]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), GIVEN.get("PYTHONPATH", "")]))
    return GIVEN | {"CI": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}


def timed(words: list[str], log: Path) -> float:
    """Seconds that the command took from start to end; each line of its log begins with the second it came in."""
    began = time.perf_counter()
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(
            words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            out.write(f"{time.perf_counter() - began:7.1f} {line}")
    seconds = time.perf_counter() - began
    if process.returncode:
        tail = log.read_text(encoding="utf-8")[-3000:]
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}\n{tail}")
    return seconds


def summary(run: Path, wall: float) -> dict[str, Any]:
    """What the run's own records say, beside the wall clock."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steps = [one for one in records if one["kind"] == "train"]
    evals = [one for one in records if one["kind"] == "eval"]
    warm = steps[min(5, len(steps) // 2) :]  # kernels are built in the first steps
    state = json.loads((run / "run.json").read_text(encoding="utf-8"))
    stepping = sum(one["seconds"] for one in steps)
    tokens = sum(one["tokens"] for one in steps)
    if not all(math.isfinite(one["loss"]) and one["grad_norm"] > 0 for one in steps):
        raise SystemExit("a step without a finite loss and a gradient")
    return {
        "wall_s": wall,
        "run_s": state.get("seconds"),
        "steps_s": stepping,
        "evaluations_s": sum(one.get("seconds", 0.0) for one in evals),
        "evaluations": len(evals),
        "steps": len(steps),
        "tokens": tokens,
        "targets": sum(one["targets"] for one in steps),
        "tokens_per_s_of_steps": tokens / stepping,
        "tokens_per_s_sustained": sum(one["tokens"] for one in warm) / sum(one["seconds"] for one in warm),
        "tokens_per_s_of_wall": tokens / wall,
        "share_outside_of_steps": 1 - stepping / wall,
        "peak_gb": max(one["memory"] for one in steps) / 1e9,
        "loss": [steps[0]["loss"], steps[-1]["loss"]],
        "grad_norm": [steps[0]["grad_norm"], steps[-1]["grad_norm"]],
    }


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="llama2-7b", help="a shape of benchmarks/peers/kit.py")
    p.add_argument("--samples", type=int, default=50_000)
    p.add_argument("--held-out", type=int, default=200, help="other samples, for evaluations; 0: none")
    p.add_argument("--batch", type=int, default=64, help="samples a step")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--quantize", default="none")
    p.add_argument("--set", action="append", default=[], help="more settings, such as train.recompute=full")
    p.add_argument("--device", default="cuda")
    p.add_argument("--folder", default="/tmp/loraloom-alpaca-run", help="for the model, the data and the run")
    p.add_argument("--commit", default="", help="where there is no repository to ask")
    p.add_argument("--out", default=str(OUT))
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    import shutil

    import torch
    from command_line import command_line

    a = arguments(argv)
    folder = Path(a.folder)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    model, vocab = write_model(a)
    train, held_out, run = folder / "train.jsonl", folder / "held-out.jsonl", folder / "run"
    tokens = write_data(train, a.samples, vocab, seed=1)
    write_data(held_out, a.held_out, vocab, seed=2)
    shutil.rmtree(run, ignore_errors=True)
    print(f"written in {time.perf_counter() - began:.0f} s: {tokens:,} tokens to train on", flush=True)
    words = command(a, model, train, held_out, run)
    wall = timed(words, folder / "log.txt")
    found = summary(run, wall)
    own = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    record = {
        "what": f"{a.samples:,} samples, {a.model} shapes, r = {a.rank}, base {a.quantize}",
        "command": command_line(),
        "commit": a.commit or own.stdout.strip(),
        "machine": torch.cuda.get_device_name() if a.device == "cuda" else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "samples": a.samples,
        "model": a.model,
        "quantize": a.quantize,
        "rank": a.rank,
        "batch": a.batch,
        "set": a.set,
        "tokens_written": tokens,
        "result": found,
    }
    Path(a.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found), flush=True)
    return record


if __name__ == "__main__":
    main()
