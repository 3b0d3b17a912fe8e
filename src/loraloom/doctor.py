"""What this machine has and lacks for fine-tuning, and the command that mends it; and how a model would run on a GPU.

Makes no request unless asked. Nothing heavy is imported at the top: a broken torch is a finding, not a crash.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import UserError

GB = 1e9
LOW_DISK = 5 * GB
CORE = ("torch", "transformers", "safetensors", "huggingface_hub", "pydantic", "rich")
EXTRAS = {
    "data": (("datasets", "pyarrow"), "Parquet files and Hugging Face data sets"),
    "gguf": (("gguf", "sentencepiece"), "GGUF files and the small demo model"),
    "report": (("matplotlib", "jinja2"), "the HTML report"),
    "eval": (("lm_eval",), "benchmarks: eval --tasks"),
}


@dataclass(frozen=True)
class Check:
    """One line: ok is True, False (something will not work), or None (for information)."""

    name: str
    value: str
    ok: bool | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(model: str | None = None, *, online: bool = False) -> list[Check]:
    """Look at everything. `online` asks the hub who we are: the only request.

    model  say instead how this model would run on a GPU

    raises  UserError if there is no such model
    """
    if model is not None:
        return examine_model(model, online=online)
    groups: list[Callable[[], Iterator[Check]]] = [software, extras, processor, gpus, disks, hub, self_test]
    if online:
        groups.append(connection)
    checks = []
    for group in groups:
        try:
            checks += list(group())
        except Exception as error:  # the doctor reports what is broken, whatever it is, and goes on
            checks.append(Check(group.__name__, "could not be examined", False, first_line(error)))
    return checks


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def software() -> Iterator[Check]:
    good = sys.version_info >= (3, 11)
    yield Check(
        "python", platform.python_version(), good, "" if good else "LoRALoom needs Python 3.11 or newer"
    )
    for package in CORE:
        found = version(package)
        if found is None:
            yield Check(package, "missing", False, f"pip install {package}")
            continue
        try:
            importlib.import_module(package)
            yield Check(package, found, True)
        except Exception as error:  # a half-installed package can raise anything
            yield Check(package, found, False, f"cannot be imported: {first_line(error)}")
    yield Check("adapter format", "PEFT", None, "adapter_config.json and adapter_model.safetensors")


def extras() -> Iterator[Check]:
    for extra, (packages, purpose) in EXTRAS.items():
        found = {package: version(package) for package in packages}
        missing = [package for package, number in found.items() if number is None]
        value = ", ".join(f"{package} {number}" for package, number in found.items() if number)
        note = f"for {purpose}: pip install 'loraloom[{extra}]'" if missing else purpose
        yield Check(f"extra: {extra}", value or "not installed", None if missing else True, note)


def processor() -> Iterator[Check]:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    yield Check("cpu", f"{platform.machine()}, {cores} cores", None)
    memory = main_memory()
    if memory:
        total, free = memory
        ok = free > 2 * GB
        note = "" if ok else "under 2 GB: only tiny models will load"
        yield Check("memory", f"{free / GB:.1f} GB free of {total / GB:.1f} GB", ok, note)


def main_memory() -> tuple[int, int] | None:
    """Total and free bytes, within the container's limit if there is one; None where the system has no answer."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        free = page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    information = Path("/proc/meminfo")
    if information.is_file():  # caches count as free: the system gives them back when asked
        lines = dict(line.split(":", 1) for line in information.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else free
    limit, used = (cgroup(name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < total:
        total, free = limit, min(free, limit - (used or 0))
    return total, free


def cgroup(name: str) -> int | None:
    """A number of the container's control group; None if there is no such limit."""
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def gpus() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        note = "training runs on the CPU: fine for small models"
        if built and shutil.which("nvidia-smi"):
            yield Check(
                "gpu",
                "none that torch can use",
                False,
                "nvidia-smi exists: check driver and CUDA_VISIBLE_DEVICES",
            )
            return
        if shutil.which("nvidia-smi"):
            yield Check(
                "gpu", "torch is built for the CPU", False, "there is a driver: install torch with CUDA"
            )
            return
        yield Check("gpu", "none", None, note)
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        formats = [name for name, has in (("bf16", major >= 8), ("fp8", (major, minor) >= (8, 9))) if has]
        yield Check(
            f"gpu {index}",
            f"{torch.cuda.get_device_name(index)}, {free / GB:.1f} GB free of {total / GB:.1f} GB",
            free > 2 * GB,
            f"capability {major}.{minor}, {' and '.join(formats) or 'no bf16: float32 is used'}",
        )
    yield from abilities(torch.cuda.is_available())


def abilities(gpu: bool) -> Iterator[Check]:
    """What training would run on: kernels, attention, 8-bit products, graphs."""
    import torch

    from .kernels.fp8 import fp8_reason
    from .kernels.twin import path_of

    device = torch.device("cuda" if gpu else "cpu")
    path, why = path_of(device)
    yield Check("kernels", path, False if gpu and path == "torch" else None, why)
    if not gpu:
        yield Check(
            "attention", "sdpa", None, "attention by documents, 8-bit products and graphs are for GPUs"
        )
        return
    capability = torch.cuda.get_device_capability(device)
    found = ["FlashAttention"] if capability[0] >= 8 else []
    found += (
        ["cuDNN for long documents"] if capability[0] >= 9 and torch.backends.cudnn.is_available() else []
    )
    note = "of torch" if found else "FlashAttention wants a GPU of 2020 or later: transformers' sdpa is used"
    yield Check("attention", ", ".join(found) or "sdpa", None, note)
    reason = fp8_reason(device)
    yield Check("8-bit products", "yes" if reason is None else "no", None, reason or "model.fp8")
    yield Check("CUDA graphs", "yes", None, "train.graphs, for short passes")


def examine_model(name: str, *, online: bool = False) -> list[Check]:
    """How a model would run on a GPU, from its config.json alone.

    raises  UserError if there is no such model
    """
    import torch

    from .adapt import attach
    from .config import resolve
    from .fast import engage
    from .incoming import quantize_model
    from .model import settle_attention
    from .nll import why_whole_logits
    from .plan import folder_of
    from .products8 import use_fp8
    from .skeleton import meta_model, num_layers, read_shape
    from .trace import Shapes

    config = resolve(None, {"model": name, "data": "none", "output": "none"})[0]
    try:
        folder = folder_of(config, offline=not online)
    except UserError as error:
        error.hint = error.hint if online else "add --online to fetch its config.json"
        raise
    shape, meta = read_shape(folder), torch.device("meta")
    model = meta_model(shape, dtype=torch.bfloat16)
    with Shapes():
        attention, _, why = settle_attention(model, "auto", meta, torch.bfloat16).partition(": ")
        whole = why_whole_logits(model)
        with meta:
            adapters = attach(model)
    lines = engage(adapters)
    coded = quantize_model(meta_model(shape, dtype=torch.bfloat16), "nf4")
    eight = use_fp8(coded, True, meta)
    taken = any(getattr(p, "fp8", False) for p in coded.parameters())
    fused = lines[0].removeprefix("fused layers: ")
    return [
        Check(
            "model",
            f"{shape.model_type}, {num_layers(shape)} layers",
            None,
            f"{folder}: on a GPU it would run so",
        ),
        Check("attention", attention, None, why),
        Check("fused layers", fused, None, "; ".join(lines[1:])),
        Check("loss", "in chunks" if whole is None else "from whole logits", None, whole or ""),
        Check(
            "8-bit products",
            "every linear layer" if not eight else "some" if taken else "none",
            None,
            "; ".join(eight) or "once quantised",
        ),
    ]


def existing(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def disks() -> Iterator[Check]:
    from huggingface_hub import constants

    from .small_model import cache_folder

    cache = Path(constants.HF_HUB_CACHE)
    for name, path in (("disk here", Path.cwd()), ("disk of the hub's cache", cache)):
        free = shutil.disk_usage(existing(path)).free
        note = str(path) if free > LOW_DISK else f"{path}: under {LOW_DISK / GB:.0f} GB"
        yield Check(name, f"{free / GB:.1f} GB free", free > LOW_DISK, note)
    for name, path in (("hub cache", cache), ("our cache", cache_folder())):
        yield Check(name, f"{folder_size(path) / GB:.2f} GB", None, str(path))


def folder_size(folder: Path) -> int:
    """Bytes of the files under a folder; links are not followed, so that no file counts twice."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            if not path.is_symlink():
                try:
                    total += path.stat().st_size
                except FileNotFoundError:
                    continue  # a file that another program has just removed
    return total


def hub() -> Iterator[Check]:
    from huggingface_hub import constants, get_token

    token = get_token()
    yield Check(
        "hub token",
        "present" if token else "none",
        None,
        "" if token else "needed for gated models only: hf auth login",
    )
    offline = bool(constants.is_offline_mode())
    yield Check(
        "hub", constants.ENDPOINT, None, "offline (HF_HUB_OFFLINE): nothing is fetched" if offline else ""
    )


def self_test() -> Iterator[Check]:
    """A step of training on a tiny model, in the number format that a run would take here."""
    from .model import pick_device, pick_dtype

    device = pick_device("auto")
    dtype, reason = pick_dtype("auto", device)
    start = time.perf_counter()
    loss, finite = tiny_step(device, dtype)
    seconds = time.perf_counter() - start
    value = f"loss {loss:.3f} in {seconds:.2f} s on {device}"
    yield Check("self-test", value, finite, reason if finite else "loss or gradients are not finite numbers")


def tiny_step(device: Any, dtype: Any) -> tuple[float, bool]:
    """Forward and backward of two attention layers. Returns the loss and whether all gradients are finite."""
    import torch
    from torch import nn
    from torch.nn import functional

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (2, 16), generator=generator).to(device)
    table = torch.randn(64, 32, generator=generator).to(device, dtype).requires_grad_()
    weights = [
        (torch.randn(32, 96, generator=generator) / 6).to(device, dtype).requires_grad_() for _ in range(2)
    ]
    x_BTI = nn.functional.embedding(ids, table)
    for weight in weights:
        q, k, v = (x_BTI @ weight).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTI = x_BTI + y.transpose(1, 2).flatten(-2)
    logits = (x_BTI @ table.T).float() / 32
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, [table, *weights])
    finite = bool(loss.isfinite()) and all(bool(item.isfinite().all()) for item in gradients)
    return loss.item(), finite


def connection() -> Iterator[Check]:
    """One request: who the token belongs to, or, without a token, whether the hub answers."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.is_offline_mode():
        yield Check("connection", "not tried", None, "HF_HUB_OFFLINE is set")
        return
    try:
        if get_token():
            yield Check("connection", f"logged in as {HfApi().whoami()['name']}", True, constants.ENDPOINT)
        else:
            next(iter(HfApi().list_models(limit=1)), None)
            yield Check("connection", "the hub answers", True, constants.ENDPOINT)
    except Exception as error:  # every kind of failure is an answer here
        yield Check("connection", "failed", False, f"{constants.ENDPOINT}: {first_line(error)}")


def render(checks: list[Check], console: Console) -> None:
    """Print the checks as a table, and what to mend below it."""
    marks = {True: "[green]ok[/]", False: "[red]no[/]", None: ""}
    table = Table(box=None, pad_edge=False, show_header=False)
    for style in ("", "bold", "", "dim"):
        table.add_column(style=style, overflow="fold")

    for check in checks:
        table.add_row(marks[check.ok], Text(check.name), Text(check.value), Text(check.note))
    console.print(table)
    wrong = [check for check in checks if check.ok is False]
    if wrong:
        console.print(f"{len(wrong)} to mend: " + ", ".join(check.name for check in wrong), markup=False)
    else:
        console.print("All is well.")
