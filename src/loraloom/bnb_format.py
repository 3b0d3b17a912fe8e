"""bitsandbytes' pre-quantised checkpoints: each linear weight as packed codes with its state beside it.

    <layer>.weight                                uint8 (H, 1), two codes a byte, the first one high
    <layer>.weight.absmax                         float32 (G,), or uint8 if the scales are quantised too
    <layer>.weight.quant_map                      float32 (16,), the table
    <layer>.weight.nested_absmax, .nested_quant_map       float32, of quantised scales
    <layer>.weight.quant_state.bitsandbytes__nf4  JSON as uint8: table, block, shape, dtype, nested offset

source  bitsandbytes 0.50, functional.QuantState.as_dict
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UserError
from .kernels.quant4 import Scales8, check4, table
from .kernels.scales8 import dynamic_map
from .quant import Codes, Weight4
from .weights8 import Codes8

STATE = ".quant_state.bitsandbytes__"
NESTED_BLOCK = 256
TABLES = ("nf4", "fp4")  # what bitsandbytes has


def is_bnb4(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json says that its weights are bitsandbytes' 4-bit ones."""
    about = config.get("quantization_config") or {}
    return about.get("quant_method") == "bitsandbytes" and bool(about.get("load_in_4bit"))


def no_place(what: str) -> UserError:
    return UserError(
        f"bitsandbytes' format has no place for {what} in 4 bits: it has nf4 and fp4, of plain layers",
        hint="model.quantize puts the model into 4 bits while it is read",
    )


@dataclass(frozen=True)
class Stored:
    """A weight in 4 bits that is still in its files; `stored[...]` reads it, as of a safetensors slice."""

    parts: Mapping[str, Any]  # what follows the weight's name, to the open file that holds it
    name: str
    kind: str  # nf4 or fp4

    def read(self, suffix: str) -> Tensor:
        return self.parts[suffix].get_tensor(self.name + suffix)

    def __getitem__(self, everything: Any) -> Weight4:
        """
        raises  UserError that names the weight if its state is missing, broken or another library's
        """
        try:
            return self.whole()
        except (KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
            what = (
                f"{error.args[0]!r} is missing"
                if isinstance(error, KeyError)
                else str(error).split("; got")[0]
            )
            raise UserError(
                f"{self.name} cannot be read as bitsandbytes' 4 bits",
                details=[what],
                hint="the checkpoint is broken: fetch it again, or convert the original model anew",
            ) from error

    def whole(self) -> Weight4:
        state = json.loads(bytes(self.read(STATE + self.kind).tolist()))
        kind, block, shape = state["quant_type"], state["blocksize"], tuple(state["shape"])
        packed, scales = self.read("").flatten().view(torch.uint8), self.scales(state)
        check4(packed, scales, table=kind, shape=shape, block=block)
        if not torch.equal(self.read(".quant_map"), table(kind, torch.device("cpu"))):
            raise ValueError(f"its table of 16 values is not {kind}'s")
        numbers = scales if isinstance(scales, Tensor) else scales.absmax_S
        if not numbers.isfinite().all():
            raise ValueError("its scales are not finite")
        return Weight4(Codes(packed, scales, kind, block, shape), getattr(torch, state["dtype"]))

    def scales(self, state: Mapping[str, Any]) -> Tensor | Scales8:
        absmax = self.read(".absmax")
        if "nested_offset" not in state:
            if absmax.dtype != torch.float32:
                raise ValueError(
                    f"its scales are {absmax.dtype}, and its state says that they are not quantised"
                )
            return absmax
        own = torch.equal(
            self.read(".nested_quant_map"), dynamic_map(signed=True, device=torch.device("cpu"))
        )
        if not own or state["nested_blocksize"] != NESTED_BLOCK:
            raise ValueError("its scales are quantised otherwise than bitsandbytes does")
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        return Scales8(absmax, self.read(".nested_absmax"), offset)


def open_state(paths: Sequence[Path]) -> dict[str, Any]:
    """Every weight of the files by name, none of them read yet.

    raises  UserError if a weight's state is missing or of another kind
    """
    where: dict[str, Any] = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(
                f"{path} is not a whole safetensors file: {error}",
                hint="bitsandbytes' checkpoints are read from safetensors only; fetch the model again",
            ) from None
        where |= dict.fromkeys(file.keys(), file)
    parts: dict[str, dict[str, Any]] = {}  # by weight: what follows its name, to the file that holds it
    for name, file in where.items():
        base = owner(name, where)
        parts.setdefault(base, {})[name.removeprefix(base)] = file
    state: dict[str, Any] = {}
    for name, held in parts.items():
        kinds = [suffix.removeprefix(STATE) for suffix in held if suffix.startswith(STATE)]
        if kinds and kinds[0] not in TABLES:
            raise UserError(f"{name} is quantised as {kinds[0]}, which bitsandbytes 0.50 does not have")
        state[name] = Stored(held, name, kinds[0]) if kinds else held[""].get_slice(name)
    return state


def owner(name: str, names: Mapping[str, Any]) -> str:
    """The weight that a tensor belongs to: itself, or `x.weight` for `x.weight.absmax`."""
    dots = (cut for cut, letter in enumerate(name) if letter == ".")
    return next((name[:cut] for cut in dots if name[:cut] in names), name)


def file_tensors(name: str, w: Weight4) -> dict[str, Tensor]:
    """One weight as bitsandbytes writes it.

    raises  UserError for what its format has no place for
    """
    codes = w.codes
    if isinstance(codes, Codes8) or codes.table not in TABLES or codes.experts is not None:
        raise no_place(f"{name}, fused experts," if codes.experts is not None else f"the table {codes.table}")
    about: dict[str, Any] = {
        "quant_type": codes.table,
        "blocksize": codes.block,
        "dtype": str(w.dtype).removeprefix("torch."),
        "shape": list(codes.shape),
    }
    s = codes.scales
    tensors = {"": codes.packed[:, None], ".quant_map": table(codes.table).clone()}
    if isinstance(s, Scales8):
        tensors |= {".absmax": s.code_G, ".nested_absmax": s.absmax_S}
        tensors[".nested_quant_map"] = dynamic_map(signed=True, device=torch.device("cpu")).clone()
        about |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(s.offset),
        }
    else:
        tensors[".absmax"] = s
    tensors[STATE + codes.table] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    return {name + suffix: tensor.cpu().contiguous() for suffix, tensor in tensors.items()}


def settings(table: str, double: bool, dtype: torch.dtype, kept: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json, by which transformers finds bitsandbytes."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": table,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(kept) or None,
    }
