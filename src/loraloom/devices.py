"""The device and the number format that a setting names, or that this machine is best at."""

from __future__ import annotations

import os

import torch

from .errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device that a setting names; auto is the first GPU, else the CPU.

    raises  UserError if it does not exist here
    """
    # Pieces of memory that grow: batches of many shapes leave few gaps. Read at the first allocation on a GPU.
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"model.device={name!r} is no device", hint="use cpu, cuda, cuda:1 or auto"
        ) from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UserError(
                f"model.device={name}: this machine has {count} GPUs that torch can use",
                hint="loraloom doctor says why; model.device=cpu works everywhere",
            )
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"model.device={name}: torch has no such device here", hint="use model.device=cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The number format of the base, and one sentence why."""
    if name != "auto":
        return DTYPES[name], f"{name}: as set"
    if device.type == "cuda":
        if capability(device) >= 8:
            return torch.bfloat16, "bfloat16: this GPU computes in it, in half of float32's memory"
        return torch.float32, "float32: this GPU has no bfloat16, and float16 overflows in training"
    if device.type == "cpu" and cpu_computes_bfloat16():
        return torch.bfloat16, "bfloat16: this CPU has instructions for it, which train about twice as fast"
    if device.type == "cpu":
        return torch.float32, "float32: this CPU has no instructions for bfloat16, and is slower in it"
    return torch.float32, "float32: the format that every device computes in"


def cpu_computes_bfloat16() -> bool:
    """Whether matrix products run in bfloat16 by hardware: AMX, or AVX-512 with BF16.

    source  benchmarks/results/cpu_dtype.json: a training step of a 135M model in both formats
    """
    tests = (
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(test is not None and test() for test in tests)


def capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
