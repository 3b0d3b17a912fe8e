"""The tensors of an adapter's files, put in the adapter's place: each one used, each parameter filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import methods
from .adapt import Adapters
from .adapter import Adapter
from .adapter_files import ALONE, LORA, OWN_WEIGHTS, WEIGHTS
from .errors import NonFinite, UserError
from .peft_tensors import (
    PREFIX,
    base_copy,
    block,
    by_module,
    file_key,
    file_tensors,
    kept,
    overlay_key,
    placed,
    tidied,
    unblock,
)
from .targets import layer_number

Slot = tuple[str, Tensor, Tensor]  # a name for people, the adapter's tensor, the file's

# ---- PEFT's own tensors -------------------------------------------------------------------------------------


def fill_from_peft(
    adapters: Adapters,
    adapter: Adapter,
    tensors: Mapping[str, Tensor],
    folder: Path,
    config: Mapping[str, Any],
) -> None:
    """Copy the tensors of PEFT's file into the adapter's.

    What the file has no place for is left as it is: the A0 and B0 that an offset's own start computes. So are
    shared bases that the file leaves out by its own word, to be drawn again from their seed.

    raises  UserError that lists every missing, surplus and misshapen tensor
    """
    refuse_unplaced(adapter, folder)
    wanted = file_tensors(adapters, adapter)
    if config.get("save_projection") is False:
        wanted = {key: value for key, value in wanted.items() if key not in shared_keys(adapter)}
    tensors = adapter.method.unpacked(tidied(tensors, shared_keys(adapter)), config, wanted)
    check(adapters, tensors, {key: value.shape for key, value in wanted.items()}, folder, config)
    slots: list[Slot] = []
    for module, sites in by_module(adapter).items():
        keys = {name: file_key(adapter, module, sites[0], name) for name in block(sites)}
        held = {name: tensors[key] for name, key in keys.items() if key in tensors}
        for site, part in zip(sites, unblock(sites, held, f"{folder}: {module}")):
            slots += [(f"{site.layer.key}/{name}", site.p[name], value) for name, value in part.items()]
    copy_in([*slots, *whole_slots(adapters, adapter, tensors)], folder)


def refuse_unplaced(adapter: Adapter, folder: Path) -> None:
    """
    raises  UserError for a parameter that no file of PEFT's can hold
    """
    for key, site in adapter.sites.items():
        lacking = [
            name for name in sorted(kept(site) - placed(site)) if isinstance(site.p[name], nn.Parameter)
        ]
        if lacking:
            name = methods.name_of(site.method)
            raise UserError(f"{folder}: PEFT's files have no {lacking[0]} of {name} for {key}")


def shared_keys(adapter: Adapter) -> set[str]:
    """The keys of the tensors that all layers share."""
    found = next(iter(adapter.sites.items()), None)
    if found is None:
        return set()
    return {file_key(adapter, found[0], found[1], name) for name in adapter.method.peft_shared}


def whole_slots(adapters: Adapters, adapter: Adapter, tensors: Mapping[str, Tensor]) -> list[Slot]:
    """What the adapter trains whole, and what PEFT's file has for it."""
    return [
        (name, tensor, tensors[overlay_key(adapter, name)])
        for name, tensor in adapters.overlaid(adapter.name)
    ]


@torch.no_grad()
def copy_in(slots: Sequence[Slot], folder: Path) -> None:
    """Copy into each tensor what a file has for it.

    raises  UserError if what is one tensor here has two values there
    """
    filled: dict[int, str] = {}
    for name, tensor, value in slots:
        value = value.reshape(tensor.shape)
        first = filled.setdefault(id(tensor), name)
        if first != name and not torch.equal(tensor.cpu(), value.to(tensor.dtype)):
            raise UserError(f"adapter {folder}: {first} and {name} are one tensor here, and differ there")
        tensor.copy_(value)


# ---- our own ------------------------------------------------------------------------------------------------


def own_slots(adapters: Adapters, adapter: Adapter, form: str) -> list[tuple[str, Tensor]]:
    """Every tensor of loraloom.safetensors by its key: layer/tensor, and in the form `own` the base's full names.

    A frozen tensor that several layers share stands once, under the first of them; so does a tied parameter.
    """
    slots: list[tuple[str, Tensor]] = []
    seen: set[int] = set()
    for key, site in adapter.sites.items():
        for name in sorted(kept(site)):
            tensor = site.p[name]
            if isinstance(tensor, nn.Parameter) or id(tensor) not in seen:
                slots.append((f"{key}/{name}", tensor))
            seen.add(id(tensor))
    for full_name, tensor in adapters.overlaid(adapter.name) if form == ALONE else ():
        if id(tensor) not in seen:
            slots.append((full_name, tensor))
        seen.add(id(tensor))
    return slots


def own_tensors(adapters: Adapters, adapter: Adapter, form: str) -> dict[str, Tensor]:
    """Copies of them, as they are written."""
    slots = own_slots(adapters, adapter, form)
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in slots}


def fill_from_own(
    adapters: Adapters,
    adapter: Adapter,
    form: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    config: Mapping[str, Any],
) -> None:
    """Copy loraloom.safetensors into the adapter, and what is trained whole from beside it in the form `lora`.

    raises  UserError that lists every missing, surplus and misshapen tensor
    """
    own, wanted = tensors[OWN_WEIGHTS], own_slots(adapters, adapter, form)
    check(adapters, own, {key: tensor.shape for key, tensor in wanted}, folder, config)
    slots = [(key, tensor, own[key]) for key, tensor in wanted]
    if form == LORA:
        check(adapters, tensors[WEIGHTS], exported_shapes(adapters, adapter), folder, config)
        slots += whole_slots(adapters, adapter, tensors[WEIGHTS])
    copy_in(slots, folder)


def exported_shapes(adapters: Adapters, adapter: Adapter) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in file_tensors(adapters, adapter, LORA).items()}


# ---- what does not fit --------------------------------------------------------------------------------------


def check(
    adapters: Adapters,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, torch.Size],
    folder: Path,
    config: Mapping[str, Any],
) -> None:
    """Let pass tensors that are just those wanted.

    raises  UserError with both sides
    """
    problems = misfits(adapters.model, tensors, wanted)
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        base = config.get("base_model_name_or_path")
        raise UserError(
            f"adapter {folder} does not fit {type(adapters.model).__name__}",
            details=problems[:20] + more,
            hint=f"it was trained on {base}" if base else "was it trained on another model?",
        )


def check_finite(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """
    raises  NonFinite that names the tensors
    """
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise NonFinite(f"adapter {folder} holds values that are not finite", details=bad[:10])


def misfits(model: nn.Module, tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> list[str]:
    """Every tensor of the file that has no place, another shape, or is not there, in words."""
    problems = [
        f"{key.removeprefix(PREFIX)}: the adapter has {tuple(tensors[key].shape)}, the model needs {tuple(shape)}"
        for key, shape in wanted.items()
        if key in tensors and tensors[key].shape != shape
    ]
    problems += [f"{key.removeprefix(PREFIX)}: not in the adapter" for key in wanted if key not in tensors]
    for key in sorted(tensors.keys() - wanted.keys()):
        own = base_copy(model, key)
        if own is None:
            problems.append(f"{key.removeprefix(PREFIX)}: {why_surplus(model, key)}")
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
