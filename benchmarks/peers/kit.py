"""What the side-by-side benchmarks share: arguments, model shapes, the same batches for every peer.

--batch, --seq, --checkpoint, --data and --packing take comma lists of equal length (or of one): a JSON line for
each, in one process, so that start-up is paid once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import sys
from typing import Any

SITE = os.environ.get("PEERS_SITE", "/tmp/peers-site")  # unpacked packages, one folder for each peer
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FIELDS = ("hidden", "inter", "layers", "heads", "kv", "vocab", "theta", "tied", "rope_factor")
SHAPES = {
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000, 1e4, False, None),
    "llama3.1-8b": (4096, 14336, 32, 32, 8, 128256, 5e5, False, 8.0),
    "llama3.2-1b": (2048, 8192, 16, 32, 8, 128256, 5e5, True, 32.0),
    "tiny": (256, 512, 2, 4, 2, 512, 1e4, False, None),
    "tiny3": (256, 512, 2, 4, 2, 512, 5e5, True, 32.0),
}
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "qkvo": QKVO,
    "all": [*QKVO, "gate_proj", "up_proj", "down_proj"],
}
PACKAGES = "torch triton transformers peft accelerate bitsandbytes liger-kernel unsloth unsloth-zoo xformers"
PACKAGES += " torchtune torchao litgpt lightning"
ONOFF = ["on", "off"]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser()
    p.add_argument("--model", default="llama2-7b", choices=list(SHAPES))
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--targets", default="qv", choices=list(TARGETS))
    p.add_argument("--quant", default="none", choices=["none", "nf4", "fp8"], help="fp8: loraloom only")
    p.add_argument("--batch", default="1")
    p.add_argument("--seq", default="2048")
    p.add_argument(
        "--checkpoint", default="on", help="on|off (unsloth: on = its offloading mode, plain = True)"
    )
    p.add_argument("--data", default="random", help="random|alpaca-like")
    p.add_argument("--packing", default="off", help="off|on: alpaca-like rows of batch * seq tokens")
    p.add_argument("--steps", type=int, default=20, help="timed steps at least; also how many batches differ")
    p.add_argument("--seconds", type=float, default=0.0, help="go on until the timed steps took so long")
    p.add_argument("--alpaca-steps", type=int, default=0, help="--steps of alpaca-like data (0: --steps)")
    p.add_argument("--warmup", type=int, default=5)
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--compile", default="off", choices=ONOFF)
    p.add_argument("--autocast", default="off", choices=ONOFF, help="peft: fp32 adapters under bf16 autocast")
    p.add_argument("--attn", default="sdpa", help="peft: sdpa|flex_attention|eager")
    p.add_argument("--xformers", default="off", choices=ONOFF, help="unsloth only")
    p.add_argument("--note", default="", help="any words to stand in the JSON line")
    return p


def parse(p: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments; `geom` is the model's shape, `runs` one Namespace for each member of the comma lists."""
    a = p.parse_args(argv)
    a.geom = argparse.Namespace(**dict(zip(FIELDS, SHAPES[a.model])))
    lists = {k: str(getattr(a, k)).split(",") for k in ("batch", "seq", "checkpoint", "data", "packing")}
    count = max(map(len, lists.values()))
    if any(len(v) not in (1, count) for v in lists.values()):
        p.error("comma lists differ in length")
    a.runs = []
    for i in range(count):
        r = {k: v[i if len(v) == count else 0] for k, v in lists.items()}
        if r["data"] not in ("random", "alpaca-like") or r["packing"] not in ONOFF:
            p.error(f"no such data or packing: {r['data']}, {r['packing']}")
        a.runs.append(argparse.Namespace(**r | {"batch": int(r["batch"]), "seq": int(r["seq"])}))
    return a


def use_site(*names: str) -> None:
    """Put the carried packages first on the path, here and for child processes (compile workers)."""
    paths = [p for p in (os.path.join(SITE, n) for n in names) if os.path.isdir(p)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def draw_length(generator: Any) -> int:
    """Tokens of an Alpaca-like example: log-normal, median 110, sigma 0.6, 16 to 1,024."""
    import torch

    drawn = math.exp(math.log(110) + 0.6 * torch.randn((), generator=generator).item())
    return int(min(1024, max(16, drawn)))


def make_batches(a: argparse.Namespace, r: argparse.Namespace) -> list[dict[str, Any]]:
    """The same batches for every peer: ids, labels (unshifted, -100 = ignored), mask (None if dense), lens, pos.

    lens  tokens of each document, None where every row is full
    real  tokens without padding; slots with it
    """
    import torch

    generator = torch.Generator().manual_seed(1234)
    made = {"random": dense, "alpaca-like": packed if r.packing == "on" else padded}[r.data]
    steps = a.steps if r.data == "random" else a.alpaca_steps or a.steps
    found = []
    for _ in range(a.warmup + steps):
        b = {"mask": None, "lens": None, "pos": None, "slots": 0} | made(a.geom.vocab, r, generator)
        b["slots"] = b["ids"].numel()
        found.append({k: v.to(a.device) if torch.is_tensor(v) else v for k, v in b.items()})
    return found


def dense(vocab: int, r: argparse.Namespace, generator: Any) -> dict[str, Any]:
    """Full rows of random tokens."""
    import torch

    ids = torch.randint(0, vocab, (r.batch, r.seq), generator=generator)
    return {"ids": ids, "labels": ids.clone(), "real": ids.numel()}


def padded(vocab: int, r: argparse.Namespace, generator: Any) -> dict[str, Any]:
    """Rows of different length, padded on the right to the longest of the micro-batch."""
    import torch

    lens = [min(draw_length(generator), r.seq) for _ in range(r.batch)]
    ids = torch.randint(0, vocab, (r.batch, max(lens)), generator=generator)
    mask = (torch.arange(max(lens))[None] < torch.tensor(lens)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    ids = ids.masked_fill(mask == 0, 0)
    return {"ids": ids, "labels": labels, "mask": mask, "widths": lens, "real": sum(lens)}


def packed(vocab: int, r: argparse.Namespace, generator: Any) -> dict[str, Any]:
    """One row (1, T) of whole documents, T <= batch * seq, without padding; no target crosses a boundary."""
    import torch

    lens, room = [], r.batch * r.seq
    while (length := draw_length(generator)) <= room:
        lens.append(length)
        room -= length
    ids = torch.randint(0, vocab, (1, sum(lens)), generator=generator)
    pos = torch.cat([torch.arange(length) for length in lens])[None]
    labels = ids.masked_fill(pos == 0, -100)
    return {"ids": ids, "labels": labels, "pos": pos, "lens": lens, "real": sum(lens)}


def hf_config(a: argparse.Namespace) -> Any:
    from transformers import LlamaConfig

    g = a.geom
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": g.theta}
    if g.rope_factor:
        rope |= {"rope_type": "llama3", "factor": g.rope_factor, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return LlamaConfig(
        hidden_size=g.hidden,
        intermediate_size=g.inter,
        num_hidden_layers=g.layers,
        num_attention_heads=g.heads,
        num_key_value_heads=g.kv,
        vocab_size=g.vocab,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072 if g.rope_factor else 16384,
        tie_word_embeddings=g.tied,
        rope_parameters=rope,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


def versions() -> dict[str, str]:
    """Of the packages that were imported."""
    found = {}
    for name in PACKAGES.split():
        if name.replace("-", "_") in sys.modules:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "?"
    return found
