"""Turn a GGUF file, or a folder with .bin or safetensors weights, into a safetensors folder.

Weights go through one at a time and are written in shards, so the peak is about one shard. Then the result is
checked before it takes its place: every tensor read back, and the logits of source and result compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from torch import Tensor

from . import files
from .convert_sources import Source, open_source
from .errors import Failure, UserError
from .model_files import find_weights
from .pretrained import quiet
from .shards import ShardWriter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAME = 1e-3  # logits of the same weights may differ by this much (order of sums)


@dataclass(frozen=True)
class ConvertReport:
    """What was written, and what the check found."""

    source: str
    folder: str
    kind: str  # gguf, bin or safetensors
    formats: list[str]  # the number formats of the source
    dtype: str  # of the result; "as it was" when no tensor was changed
    tensors: int
    parameters: int
    bytes: int
    rounding: float  # largest |rounded - exact| / largest |exact| of a tensor; 0 if nothing was lost
    logit_difference: float  # largest, between the exact source and the result, on a short input
    same_top: float  # share of positions where both have the same most likely token
    checks: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    progress: bool = True,
) -> ConvertReport:
    """Write `dst`, a folder that transformers and every tool around it reads.

    dtype         float32, bfloat16 or float16; None keeps what the source has (a quantised GGUF: bfloat16)
    tokenizer     a folder whose tokenizer is taken instead of the one in a GGUF file
    allow_pickle  read .bin files; they are read without running code (torch's weights_only) all the same
    force         replace an existing `dst`
    raises        UserError if the source cannot be used or `dst` exists, Failure if the result differs
    """
    src, dst = Path(src), Path(dst)
    check_target(src, dst, force=force)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown number format {dtype!r}", hint=f"it can be {', '.join(DTYPES)}")
    source = open_source(src, tokenizer=tokenizer, allow_pickle=allow_pickle)
    target = DTYPES[dtype] if dtype else source.dtype
    with files.whole_folder(dst) as folder, torch.no_grad(), quiet():
        source.write_rest(folder, target)
        count, parameters = write_weights(source, folder, target, progress)
        rounding = compare_tensors(source, folder, target, progress)
        difference, same_top = compare_logits(source, folder, target)
    weights = find_weights(dst)
    return ConvertReport(
        source=str(src),
        folder=str(dst),
        kind=source.kind,
        formats=source.formats,
        dtype=str(target).removeprefix("torch.") if target else "as it was",
        tensors=count,
        parameters=parameters,
        bytes=weights.bytes,
        rounding=rounding,
        logit_difference=difference,
        same_top=same_top,
        checks=[
            f"all {count} tensors read back from the disk are the source's",
            "source and result give the same logits on a short input",
            *source.checks,
        ],
    )


def check_target(src: Path, dst: Path, *, force: bool) -> None:
    """raises  UserError if `dst` is a file, the source itself, or not empty (unless forced)"""
    if dst.resolve() in (src.resolve(), *src.resolve().parents):
        raise UserError(f"the result {dst} would replace its own source {src}", hint="choose another folder")
    if dst.is_file():
        raise UserError(f"{dst} is a file; the result is a folder", hint="choose another name")
    if dst.is_dir() and any(dst.iterdir()) and not force:
        raise UserError(
            f"{dst} exists and is not empty", hint="choose another folder, or replace it with --force"
        )


def bar(
    items: Iterator[tuple[str, Tensor]], total: int, label: str, show: bool
) -> Iterator[tuple[str, Tensor]]:
    """Pass the tensors on, with a progress bar on stderr."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (show and console.is_terminal)) as shown:
        task = shown.add_task(label, total=total)
        for item in items:
            yield item
            shown.advance(task)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Round a floating tensor; counters and masks stay what they are."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def write_weights(source: Source, folder: Path, dtype: torch.dtype | None, progress: bool) -> tuple[int, int]:
    """Write the shards. Returns the number of tensors and of parameters."""
    writer = ShardWriter(folder)
    count = parameters = 0
    for name, tensor in bar(source.tensors(), source.count, "converting", progress):
        rounded = cast(tensor, dtype)
        if not rounded.isfinite().all() and tensor.isfinite().all():
            raise UserError(
                f"{name} has values beyond the range of {dtype} (largest: {tensor.abs().max().item():.3g})",
                hint="convert to --dtype bfloat16 or float32",
            )
        writer.add(name, rounded)
        count, parameters = count + 1, parameters + tensor.numel()
    if not count:
        raise UserError(f"{source.path} holds no weights")
    writer.finish()
    return count, parameters


def compare_tensors(source: Source, folder: Path, dtype: torch.dtype | None, progress: bool) -> float:
    """Read every tensor back. Returns the largest rounding error, relative to the tensor's largest value."""
    place = {}
    for path in find_weights(folder).paths:
        with safe_open(path, framework="pt") as file:
            place.update(dict.fromkeys(file.keys(), path))
    worst = 0.0
    for name, tensor in bar(source.tensors(), source.count, "checking", progress):
        with safe_open(place[name], framework="pt") as file:
            written = file.get_tensor(name)
        if not torch.equal(written, cast(tensor, dtype)):
            raise Failure(f"{name} was not written as it was read", hint="the disk may be failing; run again")
        scale = tensor.abs().max().item() if tensor.numel() else 0
        if scale and written.dtype != tensor.dtype:
            worst = max(worst, (written.double() - tensor.double()).abs().max().item() / scale)
    return worst


def compare_logits(source: Source, folder: Path, dtype: torch.dtype | None) -> tuple[float, float]:
    """Run source and result on a short input, in float32.

    Returns the largest difference of a logit and the share of equal most likely tokens, exact source against
    result. One model is in memory at a time.
    raises  Failure if the result differs from the source rounded to the same format
    """
    result = source.outputs(lambda: source.load_folder(folder, dtype))
    expected = source.outputs(lambda: source.load_source(dtype))
    if not close(result, expected):
        raise Failure("the converted model gives other logits than its source; it was not kept")
    exact = expected if dtype is None else source.outputs(lambda: source.load_source(None))
    same = (exact.argmax(-1) == result.argmax(-1)).double().mean().item()
    return (exact - result).abs().max().item(), same


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a - b).abs().max().item() <= SAME * max(1.0, b.abs().max().item())
