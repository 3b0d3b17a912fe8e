"""Adapters on a model: attach, detach, switch, several at once, a choice for each row, merge and unmerge.

The model is not wrapped and its parameters keep their names and bits: an adapted module's `forward` is
replaced on that one instance, and given back on detach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, AdapterSpec, has_gain, seed_of
from .bank import Bank
from .errors import UserError, did_you_mean
from .flow import Flow, Text
from .forwards import Forwards
from .making import make_adapter
from .merging import Pristine
from .methods.base import unique
from .overlay import Overlay
from .refusals import refuse_merging


class Adapters:
    """All adapters of one model, and which of them are in use.

    device  where the adapters' tensors live, each layer's own device by default; a model on meta needs one
            for adapters that have numbers
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None = None) -> None:
        if carries_adapters(model):
            raise UserError(
                "this model carries adapters already",
                hint="add to the object that attach() returned, or detach() it",
            )
        self.model = model
        self.device = None if device is None else torch.device(device)
        self.flow = Flow()
        self.adapters: dict[str, Adapter] = {}
        self.merged: tuple[str, ...] = ()
        self._forwards = Forwards(model, self.flow)
        self._routing: Tensor | None = None
        self._explicit = False
        self._text = Text()
        self._pristine = Pristine()
        self.fast: list[Any] = []  # fused decoder layers, if fast.engage() was called
        self.undo: dict[str, Callable[[], None]] = {}  # by who put something on the model: takes it off
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    @property
    def banks(self) -> dict[str, Bank]:
        """By module name: the adapters' rows on each adapted layer."""
        return self._forwards.banks

    @property
    def overlays(self) -> dict[str, Overlay]:
        """By module name: what adapters train whole."""
        return self._forwards.overlays

    # ---- adapters come and go ---------------------------------------------------------------------------

    def add(
        self, name: str, spec: AdapterSpec, *, blank: bool = False, starting: bool | None = None
    ) -> Adapter:
        """Make an adapter and put it in use, alone. The model computes what it did before.

        blank     its tensors will be filled from a file: what would be computed from weights is only allocated
        starting  whether training starts with it, which some methods cannot do everywhere; not blank if None

        raises  UserError if the name is taken, or a setting does not fit the model
        """
        self._not_merged()
        self._not_held()
        if self._hook.id not in self.model._forward_pre_hooks:
            raise UserError("these adapters were detached from their model", hint="attach() anew")
        if name in self.adapters or not name:
            raise UserError(
                f"there is an adapter named {name!r} already" if name else "an adapter needs a name"
            )
        try:
            self.adapters[name] = self._make(name, spec, blank, not blank if starting is None else starting)
        except BaseException:
            self._forget(name)
            raise
        self.use(name)
        return self.adapters[name]

    def _make(self, name: str, spec: AdapterSpec, blank: bool, starting: bool) -> Adapter:
        self.flow.seeds[name] = seed_of(spec.seed, name="dropout")
        return make_adapter(self._forwards, name, spec, device=self.device, blank=blank, starting=starting)

    def remove(self, name: str) -> None:
        """Take an adapter off the model; a module that carries none any more gets its own forward back."""
        self._not_merged()
        self._known([name])
        self.use(*(other for other in self.flow.active if other != name))
        self._forget(name)

    def _forget(self, name: str) -> None:
        """Drop an adapter's settings and tensors."""
        self.adapters.pop(name, None)
        self.flow.seeds.pop(name, None)
        self._forwards.forget(name)
        for layer in self.fast:
            layer.forget()

    def detach(self) -> None:
        """Take everything off: the model is again what it was, bit for bit."""
        self.unmerge()
        self.unfuse()
        for name in list(self.adapters):
            self.remove(name)
        while self.undo:
            self.undo.popitem()[1]()
        self._hook.remove()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))

    def unfuse(self) -> None:
        """Give fused decoder layers their own code again."""
        for layer in self.fast:
            layer.release()
        self.fast.clear()

    # ---- which are in use -------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return list(self.adapters)

    @property
    def active(self) -> tuple[str, ...]:
        return self.flow.active

    def inserts(self, name: str) -> tuple[int, int]:
        """How many tokens of its own an adapter puts before a text, and before its last answer."""
        return self.adapters[name].method.inserts()

    def use(self, *names: str | None) -> None:
        """Switch to these adapters, summed; to none at all without a name. Costs nothing: no weight moves.

        raises  UserError if one is unknown, or two of them scale the whole output of one layer (DoRA)
        """
        self._not_merged()
        self._not_held()
        chosen = tuple(dict.fromkeys(name for name in names if name is not None))
        self._known(chosen)
        self._check_sum(chosen, training=self.flow.training)
        self._routing = self.flow.mask_BMK = self.flow.seen = None
        self.flow.active = chosen

    def _check_sum(self, chosen: Sequence[str], *, training: bool) -> None:
        """Refuse what cannot be summed: a gain on the whole output, a module trained whole, dropout."""
        if len(chosen) < 2:
            return
        gained = [n for n in chosen if any(has_gain(site) for site in self.adapters[n].sites.values())]
        whole = [n for n in chosen if any(True for _ in self.overlaid(n))]
        dropped = [n for n in chosen if self.adapters[n].method.dropout]
        if gained:
            raise UserError(
                f"{', '.join(gained)} scales the whole output of a layer, so it cannot be summed with others"
            )
        if whole:
            raise UserError(
                f"{', '.join(whole)} has biases or modules of its own, so it cannot be summed with others"
            )
        if dropped and training:
            raise UserError(
                f"{', '.join(dropped)} trains with dropout, so each token must have one adapter",
                hint="route rows to adapters, or set dropout to 0",
            )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, for as long as this lasts."""
        before = self._choice()
        seen = self.flow.seen
        self.use()
        try:
            yield
        finally:
            self._choose(before)
            self.flow.seen = seen

    @contextmanager
    def routed(self, rows: Sequence[str | None]) -> Iterator[None]:
        """One adapter for each row of the batch, or None for the base, as long as this lasts.

        source  LoRA paper, section 4.2
        """
        self._not_merged()
        self._not_held()
        chosen = list(dict.fromkeys(name for name in rows if name is not None))
        self._known(chosen)
        before = self._choice()
        self.flow.active, self.flow.seen = tuple(chosen), None
        if (len(chosen) == 1 and None not in rows) or not chosen:
            self._routing = None  # one owner for all: nothing to mask
        else:
            device = next(self.model.parameters()).device
            table = [[name == row for name in chosen] for row in rows]
            self._routing = torch.tensor(table, device=device)[:, None, :]
        self.flow.mask_BMK = self._routing
        try:
            yield
        finally:
            self._choose(before)

    def _choice(self) -> tuple[tuple[str, ...], Tensor | None, Tensor | None]:
        return self.flow.active, self._routing, self.flow.mask_BMK

    def _choose(self, before: tuple[tuple[str, ...], Tensor | None, Tensor | None]) -> None:
        active, self._routing, self.flow.mask_BMK = before
        self.flow.active = tuple(
            name for name in active if name in self.adapters
        )  # some may be removed by now

    def _known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.adapters:
                raise UserError(f"there is no adapter named {name!r}", hint=did_you_mean(name, self.adapters))

    # ---- training ---------------------------------------------------------------------------------------

    def train(self) -> None:
        """Dropout on. The base model's own mode is not touched.

        raises  UserError if several adapters in use are summed and one of them has dropout, or one must see
                data before its first step and has seen none
        """
        unready = [name for name in self.flow.active if not self.adapters[name].ready]
        if unready:
            raise UserError(
                f"{', '.join(unready)} must see data before training starts",
                hint="call loraloom.prepare.prepare(adapters, batches); `loraloom train` does it by itself",
            )
        if self._routing is None:
            self._check_sum(self.flow.active, training=True)
        self.flow.training = True

    def eval(self) -> None:
        """Dropout off."""
        self.flow.training = False

    def parameters(self, *names: str) -> list[nn.Parameter]:
        """What trains, each tensor once: of these adapters, or of all."""
        return [parameter for _, parameter in self.named_parameters(*names)]

    def named_parameters(self, *names: str) -> list[tuple[str, nn.Parameter]]:
        """What trains, by a stable name: `adapter|layer/tensor`."""
        chosen = names or tuple(self.adapters)
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for name in chosen:
            for key, tensor in self.adapters[name].named_tensors():
                if isinstance(tensor, nn.Parameter):
                    found.setdefault(id(tensor), (f"{name}|{key}", tensor))
            for key, tensor in self.overlaid(name):
                found[id(tensor)] = (f"{name}|{key}", tensor)
        return list(found.values())

    def named_tensors(self) -> dict[str, Tensor]:
        """All that adapters have, trained or frozen, by `adapter|name|layer/tensor` or `whole|name|parameter`.

        What several layers share stands under its first name alone.
        """
        named: dict[int, tuple[str, Tensor]] = {}
        for name, adapter in self.adapters.items():
            for key, tensor in adapter.named_tensors():
                named.setdefault(id(tensor), (f"adapter|{name}|{key}", tensor))
            for key, tensor in self.overlaid(name):
                named.setdefault(id(tensor), (f"whole|{name}|{key}", tensor))
        return dict(named.values())

    def overlaid(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The base's parameters that an adapter replaces by its own, by the base's full names."""
        for module_name, overlay in self.overlays.items():
            for tensor_name, tensor in overlay.p.get(name, {}).items():
                yield f"{module_name}.{tensor_name}", tensor

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups of the active adapters: the method's, and one for what is trained whole."""
        groups: list[dict[str, Any]] = []
        for name in self.flow.active:
            adapter = self.adapters[name]
            groups += adapter.method.groups(list(adapter.sites.values()), lr)
            whole = unique(tensor for _, tensor in self.overlaid(name))
            groups += [{"params": whole, "lr": lr}] if whole else []
        return groups

    @contextmanager
    def batch(self, *, step: int, token_BT: Tensor | None = None) -> Iterator[None]:
        """Name the step and its tokens, so that dropout does not depend on how the step is split."""
        self._explicit, self.flow.clock, self.flow.token_BT = True, step, token_BT
        try:
            yield
        finally:
            self._explicit, self.flow.token_BT = False, None
            self.flow.keys.clear()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Compute each layer's rows once for all forward passes inside, and bring their gradient back at the end.

        Parameters must not move meanwhile, and `backward` belongs inside. One LoRA alone is used as it is, held
        or not.

        raises  RuntimeError from a `backward` that comes too late, whose gradient would be lost
        """
        self._not_held()
        pairs: list[tuple[Tensor, Tensor]] = []
        try:
            for bank in self.banks.values():
                pairs += bank.hold()
            yield
            reached = [(built, leaf.grad) for built, leaf in pairs if leaf.grad is not None]
            if reached:
                torch.autograd.backward([built for built, _ in reached], [grad for _, grad in reached])
        finally:
            for bank in self.banks.values():
                bank.held = None
            for layer in self.fast:
                layer.forget()
            for _, leaf in pairs:
                leaf.register_hook(too_late)

    def _see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward pass of the model: how many tokens there are, and which of them adapters touch."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        flow = self.flow
        flow.tokens = flow.ids_BT = None
        if isinstance(ids, Tensor) and ids.dim() >= 2:
            flow.tokens = (ids.shape[0], ids.shape[1])
            flow.ids_BT = None if ids.is_floating_point() else ids
        if self._routing is not None and flow.tokens and flow.tokens[0] != len(self._routing):
            raise UserError(
                f"routed() names {len(self._routing)} rows, the batch has {flow.tokens[0]}",
                hint="give one adapter, or None, for each row of the batch",
            )
        if flow.training and flow.active and not self._explicit:
            flow.clock += 1
        flow.mask_BMK = self._routing
        if any(self.adapters[name].method.per_token for name in flow.active):
            if not isinstance(ids, Tensor) or ids.is_floating_point():
                raise UserError("an adapter here chooses tokens by their ids: call the model with input_ids")
            flow.mask_BMK = self._by_token(ids, kwargs)
        flow.seen = flow.state()

    def _by_token(self, ids_BT: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The mask of owners (B, T, K) when some methods choose among tokens."""
        active = self.flow.active
        whole_BS = self._text.so_far(ids_BT, kwargs.get("past_key_values"))
        position_BT = kwargs.get("position_ids") if whole_BS is ids_BT else None
        if self._routing is None:
            mask_BTK = torch.ones(*ids_BT.shape, len(active), dtype=torch.bool, device=ids_BT.device)
        else:
            mask_BTK = self._routing.expand(-1, ids_BT.shape[1], -1).clone()
        for k, name in enumerate(active):
            if self.adapters[name].method.per_token:
                mask_BS = self.adapters[name].method.token_mask(whole_BS, position_BT)
                mask_BTK[..., k] &= mask_BS[:, -ids_BT.shape[1] :]
        return mask_BTK

    # ---- merging ----------------------------------------------------------------------------------------

    def merge(self, *names: str) -> None:
        """Fold adapters (the active ones, or those named) into the weights: W0 + delta, from pristine W0.

        The base's own parameters are kept aside, so that unmerging, or merging another, restores their bits.
        Costs a second copy of the adapted weights. The merged model runs without any of our code.

        raises  NotMergeable if a method's effect is not a change of W; NonFinite if a merged weight is not finite
        """
        chosen = names or self.merged or self.flow.active
        self._known(chosen)
        self._not_held()
        for name in chosen:
            refuse_merging(self.adapters[name].method)
        self.unmerge()
        self.use(*chosen)
        self._pristine.fold(self.flow.active, self.banks.values(), self.overlays.values())
        self.merged = self.flow.active
        self._forwards.lay(off=True)

    def unmerge(self) -> None:
        """Put the base's own parameters back, the very same tensors."""
        if self.merged:
            self._pristine.restore()
            self.merged = ()
            self._forwards.lay()

    def _not_merged(self) -> None:
        if self.merged:
            raise UserError(
                f"{', '.join(self.merged)} is merged into the weights", hint="call unmerge() first"
            )

    @property
    def held(self) -> bool:
        """Whether `hold` has built what the layers compute."""
        return any(bank.held is not None for bank in self.banks.values())

    def _not_held(self) -> None:
        if self.held:
            raise RuntimeError("the bank is held: leave hold() before switching adapters")


def carries_adapters(model: nn.Module) -> bool:
    """Whether some `Adapters` hangs on the model or a part of it, merged or not."""
    return any(
        isinstance(getattr(function, "__self__", None), Bank | Overlay | Adapters)
        for module in model.modules()
        for function in (module.__dict__.get("forward"), *module._forward_pre_hooks.values())
    )


def too_late(gradient: Tensor) -> None:
    raise RuntimeError("backward() came after hold() had ended: its gradient would be lost; call it inside")


def attach(model: nn.Module, method: str = "lora", *, name: str = "default", **settings: Any) -> Adapters:
    """Put an adapter on a model and freeze everything else.

    settings  the fields of AdapterSpec (r, alpha, dropout, target_modules, seed ...); what is none of them
              goes to the method as its own setting

    raises  UserError if a setting is unknown or does not fit the model
    """
    known = AdapterSpec.__dataclass_fields__
    own = {key: value for key, value in settings.items() if key in known}
    own["options"] = own.get("options", {}) | {k: v for k, v in settings.items() if k not in known}
    spec = AdapterSpec(method=method, **own)
    spec.make()  # unknown names are refused before the model is touched
    adapters = Adapters(model)
    try:
        adapters.add(name, spec)
    except BaseException:
        adapters.detach()
        raise
    return adapters
