"""Write a model as one of bitsandbytes' 4-bit checkpoints, which transformers, vLLM and we ourselves read.

Weights go through one at a time, and the result is read back before it takes its place: every tensor, then the
model by its own config.json. What 4 bits cost is said as the error of the weights and, if both models fit in memory,
as the divergence of their predictions.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from . import bnb_format, files, verify
from .config import ModelConfig
from .convert import check_target
from .errors import Failure, UserError
from .incoming import Incoming
from .merge import write_settings
from .merge_check import released, too_large
from .merge_table import norm
from .model import (
    CLASSES,
    DTYPES,
    Loaded,
    check_folder,
    check_report,
    load_model,
    load_tokenizer,
    name_of,
    pick_device,
    read_weights,
)
from .model_files import find_weights, read_config, read_json, stored_format
from .on_load import Arrival
from .pretrained import write_tokenizer
from .quant import Weight4, dense
from .shards import ShardWriter

PROMPTS = ("The capital of France is", "What is 12 plus 30?", "def add(a, b):", "Once upon a time there was")


@dataclass(frozen=True)
class QuantizeReport:
    """What was written, and what it costs."""

    source: str
    folder: str
    table: str
    bits: float  # a weight in 4 bits, scales included
    quantised: int  # weights in 4 bits
    dtype: str  # of all others
    parameters: int
    bytes: int
    error: float  # ||W4 - W|| / ||W|| over the weights in 4 bits
    mean_kl: (
        float | None
    )  # nats a position, of the source's predictions from the result's; None if not measured
    same_top: float | None  # share of positions where both rank the same token first
    checks: list[str]


@torch.no_grad()
def quantize_folder(
    src: str | Path,
    dst: str | Path,
    *,
    table: str,
    double: bool = True,
    dtype: str | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    progress: bool = True,
) -> QuantizeReport:
    """Write `dst` with the linear layers of the model in `src` in 4 bits.

    table   nf4 or fp4
    double  keep the scales in 8 bits
    dtype   of everything else; None for the source's

    raises  UserError if the source cannot be quantised, or the format has no place for it; Failure if the result
            is not what was written
    """
    src, dst = Path(src), Path(dst)
    check_target(src, dst, force=force)
    check_source(src, allow_pickle=allow_pickle)
    target = DTYPES[dtype or stored_format(src) or "float32"]
    if table not in bnb_format.TABLES:
        raise bnb_format.no_place(f"the table {table}")
    settings = bnb_format.settings(table, double, target, kept=())  # transformers keeps the head by itself
    with files.whole_folder(dst) as folder:
        packer = Packer(
            Incoming(pick_device("auto"), table=table, double=double, plain=True), ShardWriter(folder)
        )
        model, report = read_weights(src, CLASSES["causal"], packer, {"dtype": target}, progress=progress)
        packer.finish(src, model, report)
        write_settings(model, folder, target, untied=False)
        config = read_json(folder / "config.json")
        files.write_json(folder / "config.json", config | {"quantization_config": settings})
        write_tokenizer(load_tokenizer(src), folder)
        checks = [packer.read_back(folder), packer.load_back(folder, progress)]
        kl, same = divergence(src, folder, name_of(target), allow_pickle)
    return QuantizeReport(
        source=str(src),
        folder=str(dst),
        table=table,
        bits=8 * packer.bytes / packer.weights,
        quantised=packer.count,
        dtype=name_of(target),
        parameters=packer.weights + packer.others,
        bytes=find_weights(dst).bytes,
        error=packer.lost / packer.size,
        mean_kl=kl,
        same_top=same,
        checks=checks,
    )


def check_source(src: Path, *, allow_pickle: bool) -> None:
    """
    raises  UserError if `src` is no folder of a dense model
    """
    if not src.is_dir():
        raise UserError(
            f"{src} is no model folder", hint=f"loraloom convert {src} DST makes one of a GGUF file"
        )
    if read_config(src).get("quantization_config"):
        raise UserError(f"{src} is quantised already", hint="use the model in its original format")
    check_folder(src, allow_pickle=allow_pickle)


@dataclass
class Packer:
    """Takes each weight as it is read, and writes it in 4 bits or as it is."""

    incoming: Incoming
    writer: ShardWriter
    sums: dict[str, int] = field(default_factory=dict)  # of each tensor's bytes, to compare with the disk
    count: int = 0
    weights: int = 0  # numbers in 4 bits, and their bytes
    bytes: int = 0
    others: int = 0
    lost: float = 0.0  # ||W4 - W||, and ||W||
    size: float = 0.0

    def __call__(self, arrival: Arrival) -> Tensor | None:
        value = self.incoming(arrival)
        if self.incoming.experts:
            raise bnb_format.no_place(f"{arrival.name}, fused experts,")
        if value is None:
            return None
        tensors = {arrival.name: value}
        if isinstance(value, Weight4):
            tensors = bnb_format.file_tensors(arrival.name, value)
            self.tell(arrival, value)
        else:
            self.others += value.numel()
        self.add(tensors)
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    def tell(self, arrival: Arrival, value: Weight4) -> None:
        """Keep count of a weight that went into 4 bits."""
        self.count, self.weights = self.count + 1, self.weights + value.numel()
        self.bytes += value.nbytes_stored
        w = arrival.value.to(value.device)
        self.lost = math.hypot(self.lost, norm(dense(value, torch.float32), w))
        self.size = math.hypot(self.size, norm(w))

    def add(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            kept = tensor.detach().cpu().contiguous()
            self.sums[name] = checksum(kept)
            self.writer.add(name, kept)

    def finish(self, src: Path, model: Any, report: dict[str, Any]) -> None:
        """
        raises  UserError if the files lack a weight of the model, or nothing was quantised
        """
        check_report(src, report, (), self.incoming.misfits)
        self.add({name: buffer for name, buffer in model.state_dict().items() if not buffer.is_meta})
        if not self.count:
            raise UserError(f"{src} has no linear layer to quantise")
        self.writer.finish()

    def read_back(self, folder: Path) -> str:
        """
        raises  Failure if a tensor on the disk is not the one that was written
        """
        left = dict(self.sums)
        for path in find_weights(folder).paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if left.pop(name, None) != checksum(file.get_tensor(name)):
                        raise Failure(
                            f"{name} was not written as it was made",
                            hint="the disk may be failing; run again",
                        )
        if left:
            raise Failure(f"{len(left)} tensors are not on the disk", details=sorted(left)[:8])
        return f"all {len(self.sums)} tensors read back from the disk are those that were made"

    def load_back(self, folder: Path, progress: bool) -> str:
        """
        raises  Failure, UserError if the folder is no whole model in 4 bits
        """
        found = 0

        def count(arrival: Arrival) -> Tensor:
            nonlocal found
            found += isinstance(arrival.value, Weight4)
            place: Tensor = getattr(arrival.module, arrival.name.rpartition(".")[2])
            return torch.empty(place.shape, dtype=arrival.value.dtype, device="meta")

        _, report = read_weights(
            folder, CLASSES["causal"], count, {"dtype": torch.float32}, progress=progress
        )
        check_report(folder, report, ())
        if found != self.count:
            raise Failure(f"{self.count} weights were written in 4 bits, and {found} are read back so")
        return f"the model reads back whole, {found} weights in 4 bits"


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def divergence(src: Path, dst: Path, dtype: str, allow_pickle: bool) -> tuple[float | None, float | None]:
    """Mean KL and the share of equal first tokens on a few sentences; None where the source does not fit."""
    device = pick_device("auto")
    if too_large(src, device) is not None:
        return None, None

    def load(folder: Path) -> Loaded:
        config = ModelConfig.model_validate({"id": str(folder), "dtype": dtype, "allow_pickle": allow_pickle})
        return load_model(config, offline=True, progress=False)

    source = load(src)
    prompts = [source.tokenizer(text)["input_ids"] for text in PROMPTS]
    kept = {tuple(p): verify.logits_of(source.model, torch.tensor([p])).cpu()[None] for p in prompts if p}
    del source
    released()
    result = verify.compare_models(
        lambda ids: kept[tuple(ids[0].tolist())], load(dst).model, [list(p) for p in kept], dtype=dtype
    )
    return result.mean_kl, result.top1_agreement
