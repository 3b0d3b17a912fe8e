"""The contract: a method says what it adds to y and what it adds to W; everything else is written once.

Most of the family is a low-rank pair: such a method is a `LowRank` and gives `init` and `pair`. Merging, the
bank of many adapters, mixed batches and gradients then come from shared code, because autograd carries the
gradient from the pair to the method's own tensors. What is truly different is a `Method` with its own
`update` and `delta`.

shapes  T tokens (any leading dimensions), I in, O out, R rows of the pair (r, or 2r for an offset)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import Layer

Tensors = dict[str, Tensor]  # of one site: an nn.Parameter trains, a plain tensor is frozen state


class NotMergeable(UserError):
    """The method's effect on y is not a change of W."""


@dataclass(frozen=True)
class Pair:
    """What a low-rank method does to one layer:  y -> gain * (x W^T + out * (e * (x A^T)) B^T) + bias.

    A       (R, I) rows
    B       (O, R) columns
    e       a number or (R,): what multiplies x A^T, such as alpha/r or AdaLoRA's Lambda
    out     (O,) or None: scales the low-rank output, such as VeRA's lambda_b
    gain    (O,) or None: scales the whole bias-free output, such as DoRA's m / ||W + sBA||
    shared  A and B are frozen tensors that many layers use: the bank never copies them
    """

    A: Tensor
    B: Tensor
    e: float | Tensor = 1.0
    out: Tensor | None = None
    gain: Tensor | None = None
    shared: bool = False

    def product(self) -> Tensor:
        """out * B e A, (O, I)."""
        b_OR = self.B * self.e
        return (b_OR if self.out is None else self.out[:, None] * b_OR) @ self.A


@dataclass(frozen=True)
class Site:
    """One adapter's tensors on one layer: what a method works on."""

    layer: Layer
    method: Method  # with this layer's own r and alpha
    p: Tensors

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [tensor for tensor in self.p.values() if isinstance(tensor, nn.Parameter)]


def option(default: Any, help: str) -> Any:
    """A method's own setting, with the words that the help and the docs show."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to adapt a frozen layer. Subclasses add their own settings as fields made by `option`."""

    r: int = option(16, "the rank")
    alpha: float = option(32.0, "the scale's numerator")
    dropout: float = option(0.0, "on the adapter's input")

    learning_rate: ClassVar[float] = 2e-4  # what train.learning_rate=auto means
    rate_source: ClassVar[str] = "QLoRA, section B.2, and the LoRA paper's GPT-3 runs"  # of that rate
    puts: ClassVar[bool] = False  # whether `put` replaces outputs; there is no `update` then
    per_token: ClassVar[bool] = False  # whether `token_mask` chooses among tokens
    # what must be seen before the first step (see `observe`): None, inputs, updates, gradients or originals
    needs: ClassVar[str | None] = None
    working: ClassVar[frozenset[str]] = frozenset()  # tensors only training needs: not in an adapter's files
    ranked: ClassVar[bool] = True  # whether r and alpha mean anything to it
    own_places: ClassVar[bool] = False  # whether it alone decides where it sits
    text_options: ClassVar[tuple[str, ...]] = ()  # settings that are token ids, and may be given as text
    peft_type: ClassVar[str | None] = None  # how PEFT calls it in adapter_config.json, if it has it
    peft_keys: ClassVar[Mapping[str, str]] = {}  # our tensors' names to PEFT's, of each layer
    peft_shared: ClassVar[Mapping[str, str]] = {}  # the same of tensors that all layers share

    def __post_init__(self) -> None:
        """Checks of the method's own settings; each class asks the one above it first."""

    # ---- where it sits ----------------------------------------------------------------------------------

    def auto_targets(self) -> tuple[str, ...]:
        """The entries that target_modules=auto means; none for a method that sits on no layer."""
        return ("all-linear",)

    def at(self, layer: Layer) -> Method | None:
        """The method of one layer, self as a rule; None to leave the layer out."""
        return self

    def trains_whole(self) -> str:
        """What of the base's own parameters it trains in copies: none, biases or everything."""
        return "none"

    @property
    def identity(self) -> bool:
        """Whether the model computes at the start what its base does."""
        return not any(self.inserts())

    @property
    def mergeable(self) -> bool:
        """Whether its effect is a change of W, the same for every token."""
        return not (self.per_token or any(self.inserts()))

    # ---- what it is -------------------------------------------------------------------------------------

    def init(self, layer: Layer, gen: torch.Generator) -> Tensors:
        """The method's tensors for one layer, float32: a Parameter trains, a tensor is state.

        The layer's weight may be on the meta device: then only the shapes of what depends on it matter.
        """
        raise NotImplementedError

    def init_all(self, layers: Sequence[Layer], gens: Sequence[torch.Generator]) -> list[Tensors]:
        """The tensors of all layers; a method whose layers share tensors (VeRA) overrides this."""
        return [self.init(layer, gen) for layer, gen in zip(layers, gens)]

    def update(self, layer: Layer, p: Tensors, x: Tensor, y: Tensor) -> Tensor:
        """What the method adds to y, the layer's output with features last. x is the dropped-out input."""
        raise NotImplementedError

    def delta(self, layer: Layer, p: Tensors) -> Tensor:
        """What merging adds to W, float32 (O, I).

        raises  NotMergeable where there is no such thing
        """
        raise NotImplementedError

    def inserts(self) -> tuple[int, int]:
        """How many tokens of its own it puts before a text, and before the text's last answer."""
        return 0, 0

    def put(self, layer: Layer, p: Tensors, x: Tensor, y: Tensor) -> Tensor:
        """y with what the method puts in its place, after every update; y itself as a rule."""
        return y

    def enter(self, layer: Layer, x: Tensor) -> Tensor:
        """What the frozen layer is given in place of its input (prefix tokens that its table does not have)."""
        return x

    def token_mask(self, ids_BT: Tensor, position_BT: Tensor | None) -> Tensor:
        """Which tokens the method touches, (B, T) bool; asked only if `per_token`."""
        raise NotImplementedError

    # ---- before the first step --------------------------------------------------------------------------

    def probes(self) -> tuple[int, int]:
        """(examples that `observe` is shown, optimizer steps to take on them before it looks)."""
        return 0, 0

    def observe(
        self, site: Site, store: Tensors, x_TI: Tensor, g_TO: Tensor | None, labelled_T: Tensor
    ) -> None:
        """Take in one batch. `store` is this layer's own, empty at first, and lives until `found`.

        needs=inputs     x_TI, one store for all layers that read the same input
        needs=updates    x_TI, a store for each layer
        needs=gradients  g_TO too, the loss's gradient at the layer's output: dL/dW = g^T x

        labelled_T  which tokens predict one that carries loss; padding has been left out already
        """
        raise NotImplementedError

    def found(self, site: Site, store: Tensors) -> Tensors:
        """What a layer's observations came to, small enough to keep for every layer at once.

        Empty for a layer that saw nothing (an expert no token was sent to): it starts as `init` left it.
        """
        raise NotImplementedError

    def from_original(self, site: Site, w_OI: Tensor) -> Tensors:
        """needs=originals: the tensors to start from, given the weight as it was before quantisation, float32."""
        raise NotImplementedError

    def begin(
        self, sites: Mapping[str, Site], found: Mapping[str, Tensors]
    ) -> tuple[dict[str, Any], dict[str, Tensors]]:
        """How training begins, once every layer has been seen.

        Returns changes of the adapter's settings (rank_pattern, alpha_pattern, or options of the method), each
        in place of the whole setting, and by layer tensors that replace those of `init` under these settings.
        """
        return {}, {key: tensors for key, tensors in found.items() if tensors}

    # ---- as PEFT has it ---------------------------------------------------------------------------------

    def peft_config(self) -> dict[str, Any]:
        """What adapter_config.json must say beyond r, lora_alpha, lora_dropout and the targets."""
        return {}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """This method's own settings in an adapter_config.json of its peft_type; None if it is another's."""
        return None

    def packed(self, tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """The adapter's tensors, by their keys in the file, as PEFT writes them; and what its settings then say.

        AdaLoRA leaves out what its budget has dropped.
        """
        return tensors, {}

    @classmethod
    def unpacked(cls, tensors: Tensors, config: Mapping[str, Any], whole: Mapping[str, Tensor]) -> Tensors:
        """The inverse of `packed`: a file's tensors in the shapes of `whole`, or as they are if they do not fit."""
        return tensors

    def check_steps(self, num_steps: int) -> None:
        """raises  UserError if the method's own schedule does not fit a run of so many steps"""

    # ---- in the step ------------------------------------------------------------------------------------

    def groups(self, sites: Iterable[Site], lr: float) -> list[dict[str, Any]]:
        """Optimizer groups: params, lr and, optionally, weight_decay."""
        return [{"params": unique(p for site in sites for p in site.trainable), "lr": lr}]

    def penalty(self, sites: Sequence[Site]) -> Tensor | None:
        """A term added to the loss once a step (AdaLoRA's orthogonality), or None."""
        return None

    def before_step(self, sites: Sequence[Site], step: int) -> None:
        """Runs when the step's gradients are complete and clipped; may change them (LoRA-FA, LoRA-Pro)."""

    def after_step(self, sites: Sequence[Site], step: int, num_steps: int) -> None:
        """Runs after the optimizer, gradients still there (AdaLoRA's budget, Delta-LoRA's anchor)."""


class LowRank(Method):
    """A method that is a low-rank pair."""

    def pair(self, layer: Layer, p: Tensors) -> Pair:
        """The pair as it stands, in float32, built from `p` by differentiable operations."""
        raise NotImplementedError

    def update(self, layer: Layer, p: Tensors, x: Tensor, y: Tensor) -> Tensor:
        """What the pair adds to y: the definition that the bank's shared path must equal."""
        pair = self.pair(layer, p)
        u = layer.up(layer.down(x, pair.A) * pair.e, pair.B)
        if pair.out is not None:
            u = u * pair.out
        if pair.gain is None:
            return u
        bias = layer.bias()
        wx = y if bias is None else y - bias
        return (pair.gain - 1) * wx + pair.gain * u

    def delta(self, layer: Layer, p: Tensors) -> Tensor:
        pair = self.pair(layer, p)
        product_OI = pair.product()
        if pair.gain is None:
            return product_OI
        w_OI = layer.weight(product_OI.dtype).to(product_OI.device)
        return pair.gain[:, None] * (w_OI + product_OI) - w_OI


def unique(tensors: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Each parameter once, in order: a tensor that several sites share is one parameter."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def options_of(method: type[Method]) -> Mapping[str, str]:
    """The settings a method has beyond those of every method, with their help."""
    common = {item.name for item in fields(Method)}
    return {item.name: item.metadata["help"] for item in fields(method) if item.name not in common}


def check(name: str, value: Any, *, whole: bool = False, least: float, most: float = float("inf")) -> None:
    """Let a number in range pass.

    raises  UserError
    """
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        upto = "up" if most == float("inf") else f"to {most:g}"
        raise UserError(f"method.{name} is {value!r}", hint=f"it is {kind} from {least:g} {upto}")


def choose(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Let a known word pass.

    raises  UserError
    """
    if value not in known:
        raise UserError(f"method.{name} is {value!r}", hint=f"it can be {', '.join(known)}")
