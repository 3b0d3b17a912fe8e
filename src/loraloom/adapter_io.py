"""An adapter's folder, written and read. PEFT's format is our native one, where PEFT has the method.

adapter_config.json          PEFT's settings
adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, I), lora_B.weight (O, r) ...
loraloom.json                what PEFT has no word for: the method's name, its settings, the roles
loraloom.safetensors         what PEFT has no tensors for; adapter_model.safetensors is then a plain LoRA that
                             computes the same, or is not there if there is no such LoRA (see adapter_files)

Reading is strict: every tensor is used and every parameter filled, or an error lists both sides.
"""

from __future__ import annotations

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
from .adapter_files import (
    ALONE,
    AS_PEFT,
    CONFIG,
    FILES,
    LORA,
    OWN,
    OWN_WEIGHTS,
    PEFT,
    PICKLE,
    WEIGHTS,
    Record,
    broken,
    is_peft_folder,
    read_config,
    read_record,
)
from .adapter_fill import check_finite, fill_from_own, fill_from_peft, own_tensors
from .errors import NonFinite, UserError, did_you_mean
from .peft_config import spec_of, type_of
from .peft_format import agreed, form_of, peft_settings
from .peft_tensors import file_tensors

# ---- writing ------------------------------------------------------------------------------------------------


def save_adapter(
    adapters: Adapters,
    folder: Path | str,
    name: str | None = None,
    *,
    base_model: str | None = None,
    trained_on: Mapping[str, Any] | None = None,
    **about: Any,
) -> None:
    """Write one adapter as a folder, as PEFT's if PEFT can load it; files under other names are left alone.

    name        which adapter; the only one if there is one
    base_model  the base's id, for whoever loads the folder
    trained_on  how the base was kept (model.quantize ...): PEFT's settings have no word for it
    about       further fields of adapter_config.json, such as revision or task_type

    raises  NonFinite if a tensor is not finite: nothing is written then
    """
    adapter = the_adapter(adapters, name)
    folder = Path(folder)
    form = form_of(adapter)
    tensors, config = content(adapters, adapter, form)
    bad = [key for part in tensors.values() for key, tensor in part.items() if not tensor.isfinite().all()]
    if bad:
        raise NonFinite(f"adapter {adapter.name} is not finite and was not written", details=bad[:10])
    config |= {"base_model_name_or_path": base_model} | about
    data = {file: serialise(part, {"format": "pt"}) for file, part in tensors.items()}
    for file, whole in data.items():
        files.write_bytes(folder / file, whole)
    if form != ALONE:
        files.write_json(folder / CONFIG, dict(sorted(config.items())))
    record = Record(
        form=form,
        spec=spec_json(adapter.spec),
        targets=list(adapter.sites),
        trained_on=dict(trained_on or {}),
        about=config if form == ALONE else {},
        exported=files.file_digest(folder / WEIGHTS) if form == LORA else None,
    )
    files.write_json(folder / OWN, record.to_dict())
    for stale in {file for other in FILES.values() for file in other} - {*FILES[form]}:
        (folder / stale).unlink(missing_ok=True)  # of an adapter of another form that stood here


def content(
    adapters: Adapters, adapter: Adapter, form: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors of each of the folder's files, by key; and what is to be said about them in the settings."""
    tensors: dict[str, dict[str, Tensor]] = {}
    config: dict[str, Any] = {}
    if form == ALONE:
        config = {"modules_to_save": list(adapter.spec.modules_to_save)}
    else:
        config = peft_settings(adapters, adapter, form)
        tensors[WEIGHTS] = file_tensors(adapters, adapter, form)
    if form == PEFT:
        tensors[WEIGHTS], more = adapter.method.packed(tensors[WEIGHTS])
        config |= more
    else:
        tensors[OWN_WEIGHTS] = own_tensors(adapters, adapter, form)
    return {file: dict(sorted(part.items())) for file, part in tensors.items()}, config


def folder_tensors(adapters: Adapters, name: str | None = None) -> dict[str, dict[str, Tensor]]:
    """What `save_adapter` writes now: the tensors of each file, by key."""
    adapter = the_adapter(adapters, name)
    return content(adapters, adapter, form_of(adapter))[0]


def the_adapter(adapters: Adapters, name: str | None) -> Adapter:
    if name is None and len(adapters.adapters) != 1:
        raise UserError(f"name the adapter: there are {', '.join(adapters.names) or 'none'}")
    if name is not None and name not in adapters.adapters:
        raise UserError(f"there is no adapter named {name!r}", hint=did_you_mean(name, adapters.names))
    return adapters.adapters[name or adapters.names[0]]


def spec_json(spec: AdapterSpec) -> dict[str, Any]:
    values = asdict(spec)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


# ---- reading ------------------------------------------------------------------------------------------------


def load_adapter(
    target: Adapters | nn.Module,
    folder: Path | str,
    name: str = "default",
    *,
    allow_pickle: bool = False,
    finite: bool = True,
) -> Adapters:
    """Put the adapter of a folder on a model, as an adapter of that name, and use it.

    target        a model without adapters, or the object that its adapters hang on
    allow_pickle  read adapter_model.bin if there are no safetensors; loading it as weights only
    finite        refuse values that are not; only who looks for them takes them

    raises  UserError if the folder is no adapter, or does not fit the model: every difference, on both sides
    """
    folder = Path(folder)
    record = read_record(folder)
    config = record.about if record is not None and record.form == ALONE else read_config(folder)
    if record is not None and record.form == ALONE and is_peft_folder(folder):
        raise UserError(
            f"{folder} holds two adapters: another tool has written its own beside ours", hint=AS_PEFT
        )
    if record is None or record.form != ALONE:
        type_of(config, folder)  # refuses what cannot be honoured
    tensors = read_files(folder, record, allow_pickle=allow_pickle)
    adapters = target if isinstance(target, Adapters) else Adapters(target)
    before = adapters.active
    try:
        spec = own_spec(record, folder) or spec_of(adapters.model, config, folder)
        # numbers that will come from our file need not be computed; PEFT's files count on them
        adapter = adapters.add(name, spec, blank=record is not None, starting=False)
        try:
            fill(adapters, adapter, record, tensors, folder, config)
            for part in tensors.values() if finite else ():
                check_finite(part, folder)
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


def fill(
    adapters: Adapters,
    adapter: Adapter,
    record: Record | None,
    tensors: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    config: Mapping[str, Any],
) -> None:
    """Copy the tensors of a folder's files into the adapter."""
    form = record.form if record is not None else PEFT
    if record is not None and form != ALONE:
        check_agreement(adapters, adapter, form, config, folder)
    if form == PEFT:
        fill_from_peft(adapters, adapter, tensors[WEIGHTS], folder, config)
    else:
        fill_from_own(adapters, adapter, form, tensors, folder, config)


def check_agreement(
    adapters: Adapters, adapter: Adapter, form: str, config: Mapping[str, Any], folder: Path
) -> None:
    """Refuse a folder whose two files of settings differ in what the adapter computes.

    raises  UserError, as when another tool has trained on and left our file as it was
    """
    ours = peft_settings(adapters, adapter, form)
    differ = [
        f"{key}: {config[key]} in {CONFIG}, {ours.get(key)} by {OWN}"
        for key in agreed(adapter.method, form)
        if key in config and (config[key] or None) != (ours.get(key) or None)
    ]
    if differ:
        raise UserError(f"{folder}: {CONFIG} and {OWN} do not agree", details=differ, hint=AS_PEFT)


def read_files(folder: Path, record: Record | None, *, allow_pickle: bool) -> dict[str, Mapping[str, Tensor]]:
    """The tensors of each of a folder's files, on the CPU.

    raises  UserError if one is missing or broken, or is not the one that loraloom.json is about
    """
    form = record.form if record is not None else PEFT
    if form == PEFT:
        return {WEIGHTS: read_tensors(folder, allow_pickle=allow_pickle)}
    names = [file for file in FILES[form] if file != CONFIG]
    found: dict[str, Mapping[str, Tensor]] = {file: read_safetensors(folder / file) for file in names}
    if form == LORA and record is not None and files.file_digest(folder / WEIGHTS) != record.exported:
        raise UserError(
            f"{folder}: {WEIGHTS} is not the one that {OWN} was written with",
            details=[f"{OWN_WEIGHTS} holds what {WEIGHTS} was made from, and was left as it was"],
            hint=AS_PEFT,
        )
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path.parent} holds no {path.name}")
    try:
        return parse(path.read_bytes())
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None


def read_tensors(folder: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors that a folder holds for PEFT, on the CPU.

    raises  UserError if there are none, they cannot be read, or only a pickle is there and was not asked for
    """
    pickled = folder / PICKLE
    if (folder / WEIGHTS).is_file() or not pickled.is_file():
        return read_safetensors(folder / WEIGHTS)
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


def own_spec(record: Record | None, folder: Path) -> AdapterSpec | None:
    """The settings in loraloom.json; None for a folder that another tool wrote.

    raises  UserError if the file has settings that this version does not know
    """
    try:
        return AdapterSpec(**record.spec) if record is not None else None
    except TypeError as error:
        raise broken(folder / OWN, error) from None
