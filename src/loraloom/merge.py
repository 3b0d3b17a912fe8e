"""Fold an adapter into its base weight by weight, from the base's files to the shards of the result.

    merged = round(W + delta)       summed in float32, rounded once

    dequantized  W is the weight that training saw, out of its 4 bits, straight to float32
    original     W is the checkpoint's own; of a base in 4 bits the error that training saw is then gone

No model is ever in memory. One without numbers carries the adapter; each weight stands in its module for the
moment in which the two are summed. The peak is a shard of the result, a decoder layer, and what is tied.

raises  NonFinite, NotMergeable, UserError; then nothing stands at `out` that did not stand there before
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import files
from .adapt import Adapters
from .adapter_files import is_peft_folder
from .adapter_fill import same
from .adapter_io import load_adapter, read_tensors
from .bank import Bank
from .classifier import head_names, meta_classifier
from .data import Labels
from .disk_names import Names, tied_names
from .errors import NonFinite, UserError
from .incoming import Incoming
from .layers import Conv1DLayer, kind_of
from .merge_table import LayerError, Merged, measure
from .model import CLASSES, Task, check_folder, check_report, load_tokenizer, name_of, read_weights
from .on_load import Arrival
from .peft_tensors import PREFIX, base_copy
from .pretrained import pad_id, write_generation, write_tokenizer
from .quant import Weight4, dense
from .refusals import refuse_merging
from .shards import ShardWriter
from .skeleton import meta_model, read_shape

DEQUANTIZED, ORIGINAL = "dequantized", "original"


@dataclass(frozen=True)
class Recipe:
    """What is merged, and into what.

    folder   of the base; adapter is a PEFT folder
    base     dequantized or original
    kept_in  the settings of `Incoming` for a base that was in 4 bits in training, else nothing
    seen     the base's number format in training
    read     in which its files are read
    dtype    of the result
    """

    folder: Path
    adapter: Path
    base: str
    kept_in: Mapping[str, Any]
    seen: torch.dtype
    read: torch.dtype
    dtype: torch.dtype
    device: torch.device
    keep: Sequence[str] = ()
    allow_pickle: bool = False
    labels: Labels | None = None  # of a classifier, whose head is written too


@torch.no_grad()
def merge_shards(recipe: Recipe, out: Path, *, progress: bool = False) -> Merged:
    """Write the whole model folder `out`: shards, config, generation settings, tokenizer, chat template."""
    check_folder(recipe.folder, allow_pickle=recipe.allow_pickle)
    tokenizer = load_tokenizer(recipe.folder)
    skeleton, task, more = made_of(recipe, tokenizer)
    adapters = load_adapter(
        Adapters(skeleton, device=recipe.device), recipe.adapter, allow_pickle=recipe.allow_pickle
    )
    for name in adapters.active:
        refuse_merging(adapters.adapters[name].method)
    with files.whole_folder(out) as partial:
        merger = Merger(recipe, adapters, ShardWriter(partial))
        given = {"dtype": recipe.read, "attn_implementation": "eager"} | more
        model, report = read_weights(recipe.folder, CLASSES[task], merger, given, progress=progress)
        notes = merger.finish(model, report)
        write_settings(model, partial, recipe.dtype, untied=merger.untied)
        write_tokenizer(tokenizer, partial)
    name = name_of(recipe.dtype)
    return Merged(str(out), name, recipe.base, merger.layers, sorted(merger.replaced), merger.untied, notes)


def made_of(recipe: Recipe, tokenizer: Any) -> tuple[Any, Task, dict[str, Any]]:
    """A model without numbers, what kind it is, and what its config says beside the files' own."""
    if recipe.labels is None:
        return meta_model(read_shape(recipe.folder), dtype=recipe.read, attention="eager"), "causal", {}
    skeleton = meta_classifier(read_shape(recipe.folder), recipe.labels, recipe.read)
    more = recipe.labels.settings()
    if (
        skeleton.config.get_text_config().pad_token_id is None
    ):  # a decoder reads the last token before padding
        more["pad_token_id"] = pad_id(tokenizer)
    return skeleton, "classify", more


def write_settings(model: Any, folder: Path, dtype: torch.dtype, *, untied: bool) -> None:
    """config.json and generation_config.json of a dense model."""
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    if untied:
        for config in configs.values():
            config.tie_word_embeddings = False
    for config in configs.values():
        config.dtype = name_of(dtype)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        write_generation(model.generation_config, folder)


@dataclass
class Merger:
    """Takes each weight of the base as it is read, and writes the merged one."""

    recipe: Recipe
    adapters: Adapters
    writer: ShardWriter
    layers: list[LayerError] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    untied: bool = False

    def __post_init__(self) -> None:
        recipe, model = self.recipe, self.adapters.model
        self.names = Names(model, self.writer)
        self.incoming = Incoming(recipe.device, keep=recipe.keep, **recipe.kept_in)
        self.own = {
            key: tensor for name in self.adapters.active for key, tensor in self.adapters.overlaid(name)
        }
        self.banks = {
            f"{name}.weight": bank
            for name, bank in self.adapters.banks.items()
            if any(active in bank.sites for active in self.adapters.active)
        }
        self.copies = copies_of_base(self.adapters, recipe)
        self.tied = tied_names(model)
        self.waiting: dict[str, Arrival] = {}  # of tied weights, which are known only at the end
        self.misfits: list[str] = []

    def __call__(self, arrival: Arrival) -> Tensor | None:
        place = self.adapters.model.get_parameter(arrival.name)
        turned = isinstance(arrival.value, Weight4) and kind_of(arrival.module) is Conv1DLayer
        if place.shape != (arrival.value.T if turned else arrival.value).shape:
            self.misfits.append(arrival.name)
            return None
        if arrival.name in self.tied:
            self.waiting[arrival.name] = arrival
        else:
            self.names.add(arrival.name, self.result(arrival.name, arrival))
        return torch.empty(place.shape, dtype=arrival.value.dtype, device="meta")

    def result(self, name: str, arrival: Arrival) -> Tensor:
        """What is written under a name, on the CPU."""
        if name in self.copies and not same(dense(arrival.value).cpu(), self.copies[name]):
            raise UserError(
                f"adapter {self.recipe.adapter} holds a copy of {name} that differs from the base's",
                hint="it was trained on another base: name that one with --model",
            )
        if name in self.own:
            self.replaced.append(name)
            return self.rounded(name, self.own[name].detach(), arrival)
        if name in self.banks:
            return self.summed(self.banks[name], replace(arrival, name=name))
        value = self.trained(arrival) if self.recipe.base == DEQUANTIZED else arrival.value
        return self.rounded(name, dense(value, self.written_as(arrival)), arrival)

    def trained(self, arrival: Arrival) -> Tensor:
        """The weight as training saw it."""
        value = arrival.value
        if not isinstance(value, Weight4) and value.is_floating_point() and value.dtype == self.recipe.read:
            value = value.to(self.recipe.seen)
        taken = self.incoming(replace(arrival, value=value))
        assert taken is not None  # shapes were compared before
        return taken

    def summed(self, bank: Bank, arrival: Arrival) -> Tensor:
        """W + delta, and a line of the table."""
        seen = self.trained(arrival)
        target = total = merged(bank, seen)
        if self.recipe.base == ORIGINAL and (isinstance(seen, Weight4) or seen.dtype != arrival.value.dtype):
            total = merged(bank, arrival.value.to(self.recipe.device))
        saved = self.rounded(arrival.name, total, arrival)
        self.layers.append(measure(bank.name, dense(seen, target.dtype), target, total, saved))
        return saved

    def written_as(self, arrival: Arrival) -> torch.dtype:
        """A weight that transformers keeps in float32 stays so, one of whole numbers too."""
        own = arrival.value.dtype
        return self.recipe.dtype if own == self.recipe.read or isinstance(arrival.value, Weight4) else own

    def rounded(self, name: str, value: Tensor, arrival: Arrival) -> Tensor:
        """The value in the result's number format, on the CPU.

        raises  NonFinite
        """
        saved = value.to(self.written_as(arrival)).cpu()
        if saved.is_floating_point() and not saved.isfinite().all():
            hint = "the adapter, or the base, holds NaN or infinity"
            if value.isfinite().all():
                hint = f"it goes up to {value.abs().max().item():.3g}: use --dtype bfloat16 or float32"
            raise NonFinite(f"the merged {name} is not finite in {name_of(saved.dtype)}", hint=hint)
        return saved

    def finish(self, model: Any, report: dict[str, Any]) -> list[str]:
        """Write what is tied, and buffers; returns what the user should know.

        raises  UserError if the files lack a weight of the model
        """
        heads = [f"{name}." for name in head_names(model)] if self.recipe.labels is not None else []
        notes = check_report(self.recipe.folder, report, heads, self.misfits)
        for name, own in model.named_parameters():
            if not own.is_meta:  # what transformers kept in a format of its own, and read itself
                path, _, leaf = name.rpartition(".")
                module = model.get_submodule(path)
                module._parameters[leaf] = self(Arrival(model, name, module, own.detach(), True))
        for group in dict.fromkeys(self.tied.values()):
            self.write_tied(group)
        for name, buffer in model.state_dict().items():
            if not buffer.is_meta:
                self.names.add(name, buffer)
        self.names.flush()
        self.writer.finish()
        return notes

    def write_tied(self, group: tuple[str, ...]) -> None:
        """One tensor if it is still one, else each name's own."""
        held = [self.waiting[name] for name in group if name in self.waiting]
        one = all(torch.equal(other.value, held[0].value) for other in held[1:])
        if one and not any(name in self.own or name in self.banks for name in group):
            kept = [name for name in group if name not in self.adapters.model.all_tied_weights_keys]  # type: ignore[operator]
            self.names.add((kept or list(group))[0], self.result(held[0].name, held[0]))
            return
        self.untied = True
        for name in group:
            self.names.add(name, self.result(name, self.waiting.get(name, held[0])))


def copies_of_base(adapters: Adapters, recipe: Recipe) -> dict[str, Tensor]:
    """Weights of the base that the adapter's file repeats: they must be those of this base."""
    trained = {name for active in adapters.active for name, _ in adapters.overlaid(active)}
    found: dict[str, Tensor] = {}
    if not is_peft_folder(recipe.adapter):  # PEFT alone writes such copies
        return found
    for key, tensor in read_tensors(recipe.adapter, allow_pickle=recipe.allow_pickle).items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if base_copy(adapters.model, key) is not None and name not in trained:
            found[name] = tensor
    return found


def merged(bank: Bank, value: Tensor) -> Tensor:
    """W + delta in float32 (float64 stays float64), W standing in its module for this moment."""
    with lent(bank.module, value):
        return bank.merged_weight(torch.promote_types(value.dtype, torch.float32))


@contextmanager
def lent(module: nn.Module, weight: Tensor) -> Iterator[None]:
    own = module._parameters["weight"]
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        module._parameters["weight"] = own
