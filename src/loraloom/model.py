"""Load a transformers model and its tokenizer, frozen, and write one back.

Nothing is random and nothing is guessed: a checkpoint that lacks a weight of the model, or a tokenizer with more
tokens than the model has rows, is an error (transformers fills the gaps with random numbers and goes on).
Code from a model folder is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import attention, bnb_format, files
from .config import ModelConfig
from .devices import DTYPES, capability, pick_device, pick_dtype
from .errors import OutOfMemory, UserError
from .hub import Resolved, resolve
from .incoming import Incoming, settle
from .model_files import find_weights, has_tokenizer, read_config
from .on_load import Arrival, Take, passing
from .pretrained import from_folder, pad_id, quiet, stop_ids, valid_generation, write_tokenizer
from .products8 import use_fp8
from .progress import counted, nothing
from .quant import Weight4, bits_per_parameter, stored_bytes

__all__ = [
    "DTYPES",
    "Base",
    "Loaded",
    "find_base",
    "load_model",
    "load_tokenizer",
    "pad_id",
    "pick_device",
    "pick_dtype",
    "stop_ids",
    "write_model",
]

Task = Literal["causal", "classify", "encode"]
CLASSES = {
    "causal": AutoModelForCausalLM,
    "classify": AutoModelForSequenceClassification,
    "encode": AutoModel,
}
AttentionInterface.register(attention.NAME, attention.interface(sdpa_attention_forward))
AttentionMaskInterface.register(attention.NAME, attention.masks(sdpa_mask))


@dataclass(frozen=True)
class Loaded:
    """A frozen base, ready for adapters."""

    model: Any  # a PreTrainedModel in eval mode; no parameter wants a gradient
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    reason: str  # why this dtype
    source: Resolved
    notes: list[str] = field(default_factory=list)  # what the user should know about this checkpoint
    attention: str = "sdpa: as set"  # which one, and why

    @property
    def pad_id(self) -> int:
        """The id to fill rows with."""
        return pad_id(self.tokenizer)

    @property
    def stop_ids(self) -> list[int]:
        """Every token that ends an answer."""
        return stop_ids(self.model, self.tokenizer)

    @property
    def quantised(self) -> str | None:
        """How the linear layers are kept, in words; None if they are dense."""
        held = next((p.codes for p in self.model.parameters() if isinstance(p, Weight4)), None)
        if held is None:
            return None
        return f"{held.table}, {bits_per_parameter(self.model):.3f} bits a weight {held.grain}"

    @property
    def products(self) -> str | None:
        """How quantised layers are multiplied, in words, where it is otherwise than in the base's dtype."""
        held = [p for p in self.model.parameters() if isinstance(p, Weight4)]
        eight = sum(p.fp8 for p in held)
        if not eight:
            return None
        some = "" if eight == len(held) else f"{eight} of {len(held)} "
        return f"{some}multiplied in 8-bit floats, forward and backward"

    @property
    def bytes(self) -> int:
        """Of all weights, as they are kept."""
        return sum(map(stored_bytes, self.model.parameters()))


@dataclass(frozen=True)
class Base:
    """A model whose folder is there: its tokenizer, and where its weights will go."""

    device: torch.device
    dtype: torch.dtype
    reason: str  # why this dtype
    source: Resolved
    tokenizer: Any
    largest_id: int  # that the tokenizer can give


def find_base(config: ModelConfig, *, offline: bool = False, progress: bool = True) -> Base:
    """Find the model that `config` names, and fetch it if need be; no weight is read.

    raises  UserError with a way out, for all that can be seen to be wrong without the weights
    """
    device = pick_device(config.device)
    dtype, reason = pick_dtype(config.dtype, device)
    source = resolve(
        config.id,
        revision=config.revision,
        offline=offline,
        allow_pickle=config.allow_pickle,
        progress=progress,
    )
    check_folder(source.path, allow_pickle=config.allow_pickle)
    tokenizer = load_tokenizer(source.path)
    return Base(device, dtype, reason, source, tokenizer, max(tokenizer.get_vocab().values(), default=-1))


def load_model(
    config: ModelConfig,
    *,
    base: Base | None = None,
    offline: bool = False,
    task: Task = "causal",
    new_weights: Sequence[str] = (),
    keep: Sequence[str] = (),
    progress: bool = True,
    each: Callable[[], None] = nothing,
    **extra: Any,
) -> Loaded:
    """Load the base that `config` names, weight by weight, each to its device at once, in 4 or 8 bits if asked.

    base         what `find_base` found, if it was called; its tokenizer is not used here, so another thread may
    new_weights  starts of parameter names that a checkpoint may lack ("score", "classifier"): a new head
    keep         ends of module names that stay in 16 bits on a quantised base, such as modules to train whole
    each         called before each weight; what it raises ends the loading
    extra        goes to from_pretrained, such as num_labels
    raises       UserError with a way out, for everything that can be wrong with the model
    """
    base = base or find_base(config, offline=offline, progress=progress)
    device, dtype, source = base.device, base.dtype, base.source
    incoming = Incoming(device, keep=[*keep, *new_weights], **quantisation(config, source.path))
    given = {"dtype": dtype, "attn_implementation": own_attention(config.attention), **extra}
    try:
        model, report = read_weights(
            source.path, CLASSES[task], incoming, given, progress=progress, each=each
        )
        settle(model, device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the model's weights do not fit on {device}",
            details=[
                f"{source.path} has {find_weights(source.path).bytes / 1e9:.1f} GB of weights on the disk"
            ],
            hint="use a smaller model, model.quantize=nf4, or model.device=cpu",
        ) from error
    notes = check_report(source.path, report, new_weights, incoming.misfits) + notes_of(incoming)
    check_vocabulary(source.path, model, base.largest_id)
    if any(isinstance(p, Weight4) and p.codes.experts for p in model.parameters()):
        model.set_experts_implementation("eager")  # one by one: the others want all experts dense at once
    model.requires_grad_(False).eval()
    wanted = "sdpa" if task != "causal" and config.attention == "auto" else config.attention
    chosen = settle_attention(model, wanted, device, dtype)
    notes += use_fp8(model, config.fp8, device)
    return Loaded(model, base.tokenizer, dtype, device, base.reason, source, notes, chosen)


def own_attention(name: str) -> str:
    """The attention of transformers to build a model with: varlen is taken once its weights are there."""
    return "sdpa" if name in ("auto", "varlen") else name


def settle_attention(model: Any, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Give a model the attention that a setting names; which one it is, and why, in words.

    raises  UserError if it shall be varlen and cannot
    """
    if name not in ("auto", "varlen"):
        return f"{name}: as set"
    if name == "auto":
        if device.type not in ("cuda", "meta"):
            return "sdpa: attention by documents is for GPUs"
        if dtype not in attention.HALF or (device.type == "cuda" and capability(device) < 8):
            return "sdpa: FlashAttention wants bfloat16 or float16, and a GPU of 2020 or later"
    before = model.config._attn_implementation
    with quiet():
        model.set_attn_implementation(attention.NAME)
        why = attention.varlen_reason(model)
        if why is not None:
            model.set_attn_implementation(before)
    if why is None:
        return "varlen: each document by itself" if name == "auto" else "varlen: as set"
    if name == "varlen":
        raise UserError(f"model.attention=varlen cannot be used: {why}", hint="--set model.attention=sdpa")
    return f"sdpa: {why}"


def read_weights(
    folder: Path,
    factory: Any,
    take: Take,
    given: dict[str, Any],
    *,
    progress: bool,
    each: Callable[[], None] = nothing,
) -> tuple[Any, dict[str, Any]]:
    """The model with every weight of the folder's files handed to `take`, and transformers' report.

    each  called before each weight
    """
    about = read_config(folder)
    weights = find_weights(folder)
    state = bnb_format.open_state(weights.paths) if bnb_format.is_bnb4(about) else None

    def told(arrival: Arrival) -> Tensor | None:
        each()
        step(arrival.name)
        return take(arrival)

    with quiet(), counted("weights", shown=progress) as step, passing(told) as hook:
        return from_folder(
            factory,
            folder,
            state=state,
            use_safetensors=weights.kind == "safetensors",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they come back in the report, where we refuse them
            **given,
            **hook,
        )


def quantisation(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """How the linear layers are quantised as they are read; nothing for a dense model, or one in 4 bits already.

    raises  UserError if the files are in 4 bits of another kind than the settings ask for
    """
    held = read_config(folder).get("quantization_config") or {}
    if not held:
        if config.quantize == "none":
            return {}
        return {"table": config.quantize, "block": config.quant_block, "double": config.double_quant}
    kind = held.get("bnb_4bit_quant_type", "fp4")
    if config.quantize not in ("none", kind):
        raise UserError(
            f"{folder} is quantised to {kind} already; model.quantize={config.quantize} cannot be had from it",
            hint="use the model in its original format, or leave model.quantize out",
        )
    return {}


def notes_of(incoming: Incoming) -> list[str]:
    """What the user should know of how weights were kept."""
    if not incoming.experts:
        return []
    return [
        f"{len(incoming.experts)} fused expert weights stay in 16 bits: this model cannot run them one by one"
    ]


def check_folder(folder: Path, *, allow_pickle: bool) -> None:
    """raises  UserError if the folder is no model that we may load"""
    refuse_quantised(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds a model and an adapter, which transformers would apply unseen",
            hint="move adapter_config.json and adapter_model.safetensors into a folder of their own",
        )
    weights = find_weights(folder)
    if weights.kind == "bin" and not allow_pickle:
        raise UserError(
            f"{folder} has its weights only as .bin files, which are programs that could do anything when read",
            hint=f"convert them: loraloom convert {folder} DST --allow-pickle; or read them as they are: "
            "model.allow_pickle=true",
        )
    if weights.kind in ("none", "gguf"):
        held = ", ".join(sorted(item.name for item in folder.iterdir())[:8])
        raise UserError(
            f"{folder} has a config.json and no weights",
            details=[f"looked for model.safetensors; it holds: {held}"],
            hint="the download or copy was cut short: fetch the model again",
        )


def refuse_quantised(folder: Path) -> None:
    """raises  UserError if the folder's weights are quantised in a way that we do not read"""
    about = read_config(folder)
    if (quantised := about.get("quantization_config")) and not bnb_format.is_bnb4(about):
        raise UserError(
            f"{folder} holds quantised weights ({quantised.get('quant_method')}), which are not read",
            hint="use the model in its original format; bitsandbytes' 4-bit checkpoints are read",
        )


def check_report(
    folder: Path, report: dict[str, Any], new_weights: Sequence[str], misfits: Sequence[str] = ()
) -> list[str]:
    """Notes on weights that were left out.

    misfits  weights that we left out for their shape, beside those that transformers did

    raises  UserError if a weight was missing, of another shape, or broken in the checkpoint
    """
    exempt = tuple(new_weights)
    shaped = {str(item[0]) for item in report["mismatched_keys"]} | set(misfits)
    missing = sorted(name for name in set(report["missing_keys"]) - shaped if not name.startswith(exempt))
    wrong = sorted(name for name in shaped if not name.startswith(exempt))
    errors = report.get("error_msgs") or []
    errors = list(errors.values()) if isinstance(errors, dict) else list(errors)
    unused = sorted(report["unexpected_keys"])
    details = [f"missing: {name}" for name in missing[:8]] + [
        f"of another shape: {name}" for name in wrong[:8]
    ]
    details += [str(line) for line in errors[:4]]
    if not details and unused:
        return [f"{len(unused)} weights in the files have no place in the model: {', '.join(unused[:4])}"]
    if not details:
        return []
    if unused:
        details.append(f"in the files and not in the model: {', '.join(unused[:4])}")
    raise UserError(
        f"{folder}: {len(missing) + len(wrong) + len(errors)} weights of the model are not in its files",
        details=details,
        hint="the files do not belong to this config.json, or to this kind of model; fetch the model again",
    )


def check_vocabulary(folder: Path, model: PreTrainedModel, largest: int) -> None:
    """raises  UserError if the tokenizer can give an id that has no row in the embedding; `largest` is the last"""
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if largest >= rows:
        raise UserError(
            f"{folder}: the tokenizer gives ids up to {largest}, and the model has {rows} rows for tokens",
            hint="tokens were added without resizing the model, or the tokenizer is another model's",
        )


def load_tokenizer(folder: Path | str) -> Any:
    """The tokenizer in a folder, without a request.

    raises  UserError if there is none, or it cannot be read
    """
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder} has no tokenizer (looked for tokenizer.json and its older forms)",
            hint="copy the tokenizer files of the original model into the folder",
        )
    with quiet():
        return from_folder(AutoTokenizer, folder)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_model(model: Any, tokenizer: Any, folder: Path | str) -> Path:
    """Write a whole model folder: safetensors shards, config, generation settings, tokenizer, chat template.

    raises  Failure if the disk is full; what stood in `folder` is then unharmed
    """
    if any(isinstance(parameter, Weight4) for parameter in model.parameters()):
        raise UserError(
            "a quantised model is not written as a dense one",
            hint="loraloom merge writes it in 16 bits; loraloom convert SRC DST --quantize nf4 in 4 bits",
        )
    kept = getattr(model, "generation_config", None)
    try:
        if kept is not None:
            model.generation_config = valid_generation(kept)
        with files.whole_folder(folder) as partial, quiet():
            model.save_pretrained(partial, max_shard_size="4GB")
            write_tokenizer(tokenizer, partial)
    finally:
        if kept is not None:
            model.generation_config = kept
    return Path(folder)
