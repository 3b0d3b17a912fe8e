"""What cannot work, and why: the one table of combinations that are refused.

A row names methods, what they cannot go with, how to see it, and the reason. Nothing else in the package
refuses a method for what it is put together with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from . import methods
from .adapter import AdapterSpec
from .errors import UserError
from .layers import BlockLayer, EmbeddingLayer, Layer
from .methods.base import Method, NotMergeable
from .quant import Weight4
from .targets import as_entries, input_embedding, modules_named


@dataclass(frozen=True)
class Asked:
    """What was asked for: a method with its settings, on a model or on one of its layers."""

    method: Method
    spec: AdapterSpec
    model: nn.Module
    layer: Layer | None

    @property
    def name(self) -> str:
        return methods.name_of(self.method)

    @property
    def embedding(self) -> bool:
        return isinstance(self.layer, EmbeddingLayer)

    @property
    def saves_embedding(self) -> bool:
        """Whether the table of tokens, or what holds it, is to be trained whole."""
        table = input_embedding(self.model)
        saved = modules_named(self.model, self.spec.modules_to_save)
        return any(part is table for name in saved for part in self.model.get_submodule(name).modules())

    @property
    def in_4_bits(self) -> bool:
        """Whether the layer, or any of the model if no layer is asked about, is kept in 4 bits."""
        if self.layer is None:
            return any(isinstance(p, Weight4) for p in self.model.parameters())
        return isinstance(getattr(self.layer.module, "weight", None), Weight4)

    def rank_over(self, share: int) -> bool:
        """Whether the rank is more than the layer's smaller side, divided by `share`."""
        if self.layer is None or isinstance(self.layer, BlockLayer):
            return False
        return self.method.r * share > min(self.layer.in_features, self.layer.out_features)


@dataclass(frozen=True)
class Refusal:
    """One row: these methods cannot go with this, for this reason.

    starting  it is about the start alone: an adapter that was trained elsewhere may go with it
    """

    methods: tuple[str, ...]
    what: str
    when: Callable[[Asked], bool]
    why: str
    hint: str | None = None
    starting: bool = False


SEES_DATA = ("eva", "corda", "loraga", "loraone")
NO_SITES = ("full", "bitfit")
BOTTLENECKS = ("adapterh", "adapterl")
PREFIXES = ("prefix_embedding", "prefix_layer")
SHARED_BASES = ("vera", "randlora")

REFUSALS = [
    Refusal(
        ("deltalora",),
        "dropout",
        lambda asked: asked.method.dropout > 0,
        "W moves by the change of BA, which stands for its gradient only without dropout",
        "set dropout=0",
    ),
    Refusal(
        (*NO_SITES, *BOTTLENECKS, *PREFIXES),
        "dropout",
        lambda asked: asked.method.dropout > 0,
        "there is no adapter's input to drop from",
        "set dropout=0",
    ),
    Refusal(
        (*NO_SITES, "adapterl", *PREFIXES, "lora_prefix"),
        "target_modules",
        lambda asked: (
            asked.method.own_places
            and asked.spec.target_modules != "auto"
            and tuple(as_entries(asked.spec.target_modules)) != asked.method.auto_targets()
        ),
        "the method itself says where it sits",
        "leave target_modules out",
    ),
    Refusal(
        (*NO_SITES, *PREFIXES, "lora_prefix"),
        "layers",
        lambda asked: asked.spec.layers is not None,
        "the method is about the whole model",
        "leave layers out",
    ),
    Refusal(
        (*NO_SITES, *PREFIXES),
        "rank_pattern, alpha_pattern",
        lambda asked: bool(asked.spec.rank_pattern or asked.spec.alpha_pattern),
        "the method has no rank",
        "leave the patterns out",
    ),
    Refusal(
        SHARED_BASES,
        "rank_pattern",
        lambda asked: any(asked.spec.rank_pattern.values()),
        "all layers share one pair of bases, which has one rank",
        "set r; a pattern with rank 0, which leaves layers out, can stay",
    ),
    Refusal(
        NO_SITES,
        "bias",
        lambda asked: asked.spec.bias != "none",
        "the biases are trained already",
        "leave bias out",
    ),
    Refusal(
        ("full",),
        "modules_to_save",
        lambda asked: bool(asked.spec.modules_to_save),
        "every module is trained whole already",
        "leave modules_to_save out",
    ),
    Refusal(
        ("full",),
        "a base in 4 bits",
        lambda asked: asked.in_4_bits,
        "codes of 4 bits take no small steps",
        "set model.quantize=none, or train an adapter",
    ),
    Refusal(
        ("loftq",),
        "a dense layer",
        lambda asked: asked.layer is not None and not asked.in_4_bits,
        "there is no quantisation error to make up for",
        "set model.quantize=nf4; on a dense base pissa is the like of it",
        starting=True,
    ),
    Refusal(
        ("lorafa",),
        "an embedding",
        lambda asked: asked.embedding,
        "its frozen A is zero there, so that nothing could be learnt",
        "leave the embedding out of target_modules",
    ),
    Refusal(
        SEES_DATA,
        "an embedding",
        lambda asked: asked.embedding,
        "its inputs are ids, which have no principal directions and no gradient matrix of a bearable size",
        "leave the embedding out of target_modules",
    ),
    Refusal(
        ("adalora",),
        "a target_r above r",
        lambda asked: asked.layer is None and getattr(asked.method, "target_r", 0) > asked.method.r,
        "its budget falls from r to target_r",
        "raise r, or lower method.target_r",
        starting=True,
    ),
    Refusal(
        ("loradrop",),
        "an embedding, without method.kept",
        lambda asked: asked.embedding and asked.method.needs is not None,
        "its probe measures updates of hidden states, and an embedding reads ids",
        "leave the embedding out of target_modules, or name the layers to keep",
        starting=True,
    ),
    Refusal(
        ("alora",),
        "bias, modules_to_save",
        lambda asked: asked.spec.bias != "none" or bool(asked.spec.modules_to_save),
        "what is trained whole works on every token, and this method only from its invocation on",
        "leave them out",
    ),
    Refusal(
        (*PREFIXES, "lora_prefix"),
        "the embedding among modules_to_save",
        lambda asked: asked.saves_embedding,
        "its tokens stand beside the table's own",
        "leave the embedding out of modules_to_save",
    ),
    Refusal(
        ("lora_prefix",),
        "rank 0 in rank_pattern",
        lambda asked: 0 in asked.spec.rank_pattern.values(),
        "a pattern could leave out the places of its tokens, which then had no vectors",
        "give the other layers a rank of 1 or more",
    ),
    Refusal(
        ("pissa", "milora", "olora", "loftq", "loraxs", "corda", "loraone"),
        "a rank above the layer's smaller side",
        lambda asked: asked.rank_over(1),
        "a matrix has no more singular directions than that",
        "lower r, or set rank_pattern for such layers",
    ),
    Refusal(
        ("loraga",),
        "a rank above half of the layer's smaller side",
        lambda asked: asked.rank_over(2),
        "A and B take different singular directions of the gradient, 2r in all",
        "lower r, or set rank_pattern for such layers",
    ),
]

# Methods whose effect is not a change of W, and why.
UNMERGEABLE = {
    "bitfit": "the base has no biases to put the new ones in",
    "alora": "it works only from its invocation on, and a merged weight works on every token",
    "adapterh": "a bottleneck's nonlinearity is not a change of W",
    "adapterl": "a bottleneck's nonlinearity is not a change of W",
    "prefix_embedding": "its tokens stand in the text, not in the weights",
    "prefix_layer": "it replaces hidden states, not weights",
    "lora_prefix": "its tokens stand in the text, not in the weights",
}


def refuse(
    method: Method,
    spec: AdapterSpec,
    model: nn.Module,
    layer: Layer | None = None,
    *,
    starting: bool = True,
) -> None:
    """Let pass what can work.

    starting  whether training starts here; else the adapter is read from a file

    raises  UserError with the reason and a way out
    """
    for row in matching(Asked(method, spec, model, layer)):
        if row.starting and not starting:
            continue
        where = f" ({layer.key})" if layer is not None else ""
        raise UserError(
            f"{methods.name_of(method)} cannot go with {row.what}{where}: {row.why}", hint=row.hint
        )


def matching(asked: Asked) -> Iterator[Refusal]:
    """The rows that speak against what was asked."""
    return (row for row in REFUSALS if asked.name in row.methods and row.when(asked))


def refuse_merging(method: Method) -> None:
    """Let a method pass whose effect is a change of W.

    raises  NotMergeable with the reason
    """
    if not method.mergeable:
        name = methods.name_of(method)
        why = UNMERGEABLE.get(name, "its effect is not a change of W")
        raise NotMergeable(f"{name} cannot be merged: {why}", hint="use the adapter beside its base")
