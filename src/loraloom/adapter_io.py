"""The PEFT adapter folder, written and read: our native format.

    adapter_config.json          PEFT's settings
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, I), lora_B.weight (O, r) ...
    loraloom.json                what PEFT has no word for: the method's name, its settings, the roles

q, k or v of a fused projection are written as one block: A is stacked, B has a column block for each role with
zeros elsewhere, r grows with the number of roles and alpha so that the scale stays.

Reading is strict: every tensor is used and every parameter filled, or an error lists both sides.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor, nn

from . import files
from .adapt import Adapters
from .adapter import Adapter, AdapterSpec
from .errors import NonFinite, UserError, did_you_mean
from .peft_config import CONFIG, read_config, spec_of
from .peft_format import (
    OWN,
    PREFIX,
    base_copy,
    block,
    by_module,
    file_suffix,
    file_tensors,
    overlay_key,
    peft_settings,
    tidied,
    unblock,
)
from .targets import layer_number

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


def save_adapter(
    adapters: Adapters,
    folder: Path | str,
    name: str | None = None,
    *,
    base_model: str | None = None,
    trained_on: Mapping[str, Any] | None = None,
    **about: Any,
) -> None:
    """Write one adapter as a PEFT folder; the files that stand there under other names are left alone.

    name        which adapter; the only one if there is one
    base_model  the base's id, for whoever loads the folder
    trained_on  how the base was kept (model.quantize ...): PEFT's settings have no word for it
    about       further fields of adapter_config.json, such as revision or task_type

    raises  NonFinite if a tensor is not finite: nothing is written then
    """
    adapter = the_adapter(adapters, name)
    folder = Path(folder)
    tensors = dict(sorted(file_tensors(adapters, adapter).items()))
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise NonFinite(f"adapter {adapter.name} is not finite and was not written", details=bad[:10])
    config = peft_settings(adapters, adapter) | {"base_model_name_or_path": base_model} | about
    own = {"format": 1, "spec": spec_json(adapter.spec), "targets": list(adapter.sites)}
    own |= {"trained_on": dict(trained_on)} if trained_on else {}
    files.write_json(folder / CONFIG, dict(sorted(config.items())))
    files.write_json(folder / OWN, own)
    files.write_bytes(folder / WEIGHTS, serialise(tensors, {"format": "pt"}))


def load_adapter(
    target: Adapters | nn.Module, folder: Path | str, name: str = "default", *, allow_pickle: bool = False
) -> Adapters:
    """Put the adapter of a PEFT folder on a model, as an adapter of that name, and use it.

    target        a model without adapters, or the object that its adapters hang on
    allow_pickle  read adapter_model.bin if there are no safetensors; loading it as weights only

    raises  UserError if the folder is no adapter, or does not fit the model: every difference, on both sides
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder, allow_pickle=allow_pickle)
    adapters = target if isinstance(target, Adapters) else Adapters(target)
    before = adapters.active
    try:
        spec = own_spec(folder) or spec_of(adapters.model, config, folder)
        adapter = adapters.add(name, spec)
        try:
            if (folder / OWN).is_file():
                check_agreement(adapters, adapter, config, folder)
            fill(adapters, adapter, tensors, folder, config)
        except BaseException:
            adapters.remove(name)
            adapters.use(*before)
            raise
    except BaseException as error:
        if not isinstance(target, Adapters):
            adapters.detach()
        base = config.get("base_model_name_or_path")
        if (
            isinstance(error, UserError)
            and base
            and (error.hint is None or "target_modules" in error.message)
        ):
            error.hint = f"it was trained on {base}"
        raise
    return adapters


def the_adapter(adapters: Adapters, name: str | None) -> Adapter:
    if name is None and len(adapters.adapters) != 1:
        raise UserError(f"name the adapter: there are {', '.join(adapters.names) or 'none'}")
    if name is not None and name not in adapters.adapters:
        raise UserError(f"there is no adapter named {name!r}", hint=did_you_mean(name, adapters.names))
    return adapters.adapters[name or adapters.names[0]]


def check_agreement(adapters: Adapters, adapter: Adapter, config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a folder whose two files of settings differ in what the adapter computes.

    raises  UserError, as when another tool has trained on and left our file as it was
    """
    ours = peft_settings(adapters, adapter)
    keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "modules_to_save")
    differ = [
        f"{key}: {config[key]} in {CONFIG}, {ours[key]} by {OWN}"
        for key in keys
        if key in config and (config[key] or None) != (ours[key] or None)
    ]
    if differ:
        raise UserError(
            f"{folder}: {CONFIG} and {OWN} do not agree",
            details=differ,
            hint=f"delete {OWN} to read the folder as PEFT does",
        )


def fill(
    adapters: Adapters,
    adapter: Adapter,
    tensors: Mapping[str, Tensor],
    folder: Path,
    config: Mapping[str, Any],
) -> None:
    """Copy the file's tensors into the adapter's.

    raises  UserError that lists every missing, surplus and misshapen tensor
    """
    tensors = tidied(tensors)
    problems = misfits(adapters, adapter, tensors)
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        base = config.get("base_model_name_or_path")
        raise UserError(
            f"adapter {folder} does not fit {type(adapters.model).__name__}",
            details=problems[:20] + more,
            hint=f"it was trained on {base}" if base else "was it trained on another model?",
        )
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise NonFinite(f"adapter {folder} holds values that are not finite", details=bad[:10])
    with torch.no_grad():
        for module, sites in by_module(adapter).items():
            suffixes = {name: file_suffix(sites[0], name) for name in block(sites)}
            whole = {name: tensors[f"{PREFIX}{module}.{suffix}"] for name, suffix in suffixes.items()}
            for site, part in zip(sites, unblock(sites, whole, f"{folder}: {module}")):
                for name, value in part.items():
                    site.p[name].copy_(value.reshape(site.p[name].shape))
        filled: dict[int, str] = {}
        for full_name, tensor in adapters.overlaid(adapter.name):
            value = tensors[overlay_key(adapter, full_name)]
            first = filled.setdefault(id(tensor), full_name)
            if first != full_name and not torch.equal(tensor.cpu(), value.to(tensor.dtype)):
                raise UserError(
                    f"adapter {folder}: {first} and {full_name} are one tensor here, and differ there"
                )
            tensor.copy_(value)


def misfits(adapters: Adapters, adapter: Adapter, tensors: Mapping[str, Tensor]) -> list[str]:
    """Every tensor of the file that has no place, another shape, or is not there, in words."""
    wanted = {key: tensor.shape for key, tensor in file_tensors(adapters, adapter).items()}
    problems = [
        f"{key.removeprefix(PREFIX)}: the adapter has {tuple(tensors[key].shape)}, the model needs {tuple(shape)}"
        for key, shape in wanted.items()
        if key in tensors and tensors[key].shape != shape
    ]
    problems += [f"{key.removeprefix(PREFIX)}: not in the adapter" for key in wanted if key not in tensors]
    for key in sorted(tensors.keys() - wanted):
        own = base_copy(adapters.model, key)
        if own is None:
            problems.append(f"{key.removeprefix(PREFIX)}: {why_surplus(adapters.model, key)}")
        elif not same(own, tensors[key]):
            problems.append(
                f"{key.removeprefix(PREFIX)}: a copy of the base's that differs from this model's"
            )
    return problems


def same(own: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in the coarser of their number formats; on meta, whether they could be."""
    if own.shape != other.shape:
        return False
    if own.is_meta:
        return True
    own = own.detach().cpu()
    return torch.equal(own.to(other.dtype), other) or torch.equal(own, other.to(own.dtype))


def why_surplus(model: nn.Module, key: str) -> str:
    """Why a tensor of the file has no place on this model, in words."""
    path = key.removeprefix(PREFIX)
    names = dict(model.named_modules())
    module = path
    while "." in module and module not in names:
        module = module.rpartition(".")[0]
    number = layer_number(path)
    layers = [n for name in names if (n := layer_number(name)) is not None]
    if number is not None and layers and number > max(layers):
        return f"not in the model, which has {max(layers) + 1} layers"
    known = any(path.startswith(name + ".") for name in names if name.count(".") >= path.count(".") - 2)
    return "in the adapter's file, but not in its settings" if known else "not in the model"


def read_tensors(folder: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of an adapter folder, on the CPU.

    raises  UserError if there are none, they cannot be read, or only a pickle is there and was not asked for
    """
    path, pickled = folder / WEIGHTS, folder / PICKLE
    if path.is_file():
        try:
            return parse(path.read_bytes())
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file: {error}") from None
    if not pickled.is_file():
        raise UserError(f"{folder} holds no {WEIGHTS}")
    if not allow_pickle:
        raise UserError(
            f"{folder} holds only {PICKLE}, a pickle, which can run code when it is read",
            hint="set model.allow_pickle=true if you trust its source",
        )
    try:
        return dict(torch.load(pickled, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, EOFError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{pickled} cannot be read as weights: {reason}") from None


def spec_json(spec: AdapterSpec) -> dict[str, Any]:
    values = asdict(spec)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def trained_on(folder: Path) -> dict[str, Any]:
    """How the base was kept that an adapter folder was trained on; empty for a dense one, or if nobody says."""
    own_spec(folder)  # raises if the file is broken
    path = folder / OWN
    return dict(json.loads(path.read_text(encoding="utf-8")).get("trained_on", {})) if path.is_file() else {}


def own_spec(folder: Path) -> AdapterSpec | None:
    """The settings in loraloom.json; None for a folder that another tool wrote.

    raises  UserError if the file is broken or newer than this version
    """
    path = folder / OWN
    if not path.is_file():
        return None
    try:
        own = json.loads(path.read_text(encoding="utf-8"))
        if own["format"] != 1:
            raise UserError(
                f"{path} has format {own['format']}, this version reads 1", hint="update loraloom"
            )
        return AdapterSpec(**own["spec"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is broken: {error}", hint="delete it to read the folder as PEFT does"
        ) from None
