"""The walk over an adapter's layers: what each update is, while its weight passes by on the way from the files.

As in a merge no model is in memory. One without numbers carries the adapters; each weight of the base is read,
decoded if it is in 4 bits, looked at in its module, and let go. The peak is a few matrices of the largest layer.

W is the weight that training saw. Without a base a tree of bare layers, shaped by the adapter's own file, carries
the adapter, and what needs W is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import Adapters
from .adapter import Adapter, seed_of
from .adapter_files import OWN_WEIGHTS
from .adapter_io import load_adapter
from .analysis import (
    LEADING,
    Axes,
    Spectrum,
    Update,
    drawn_similarity,
    expected_similarity,
    frobenius,
    intruders,
    projections,
    rounding,
    similarity,
)
from .bank import Bank
from .bare import bare_layers, read_as_peft, tree
from .classifier import head_names
from .deltas import (
    directions,
    has_update,
    own_axes,
    state_of,
    update_of,
    update_without,
    zero_or_not,
)
from .disk_names import tied_names
from .errors import UserError
from .incoming import Incoming
from .layers import BlockLayer, kind_of, view
from .merge import Recipe, lent, made_of
from .methods.base import Site
from .model import CLASSES, check_folder, check_report, load_tokenizer, read_weights
from .on_load import Arrival
from .quant import Weight4
from .shards import give_back_memory
from .targets import layer_number

FIRST, SECOND = "adapter", "other"
SIXTEEN = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Wanted:
    """What is to be measured.

    k, epsilon  of intruder dimensions
    layers      decoder layers whose whole phi(i, j) is kept: None for the middle one, () for all
    """

    k: int = 10
    epsilon: float = 0.5
    layers: tuple[int, ...] | None = None


@dataclass
class Walk:
    """Takes each weight of the base as it is read, and looks at the updates on it."""

    adapters: Adapters
    wanted: Wanted
    recipe: Recipe | None = None
    exported: bool = False  # read as the plain LoRA that another method was written as
    folders: Mapping[str, Path] = field(default_factory=dict)  # of the adapters
    layers: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.banks = {f"{name}.weight": bank for name, bank in self.adapters.banks.items()}
        self.own = dict(self.adapters.overlaid(FIRST))
        self.chosen = self.choose()
        self.tied: dict[str, tuple[str, ...]] = {}
        if self.recipe is not None:
            self.tied = tied_names(self.adapters.model)
            self.incoming = Incoming(torch.device("cpu"), keep=self.recipe.keep, **self.recipe.kept_in)

    def choose(self) -> set[int] | None:
        """The decoder layers whose phi is kept whole; None for all.

        raises  UserError for one that has no adapter
        """
        sites = self.adapters.adapters[FIRST].sites
        numbers = sorted({n for key in sites if (n := layer_number(key)) is not None})
        asked = self.wanted.layers
        if asked is None:
            return {numbers[len(numbers) // 2]} if numbers else None
        missing = sorted(set(asked) - set(numbers))
        if missing:
            spans = f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
            raise UserError(
                f"there is no adapter on layer {', '.join(map(str, missing))}", hint=f"layers: {spans}"
            )
        return set(asked) or None

    # ---- with the base's weights --------------------------------------------------------------------------

    def __call__(self, arrival: Arrival) -> Tensor | None:
        place = self.adapters.model.get_parameter(arrival.name)
        names = self.tied.get(arrival.name, (arrival.name,))
        hollow = torch.empty(place.shape, dtype=arrival.value.dtype, device="meta")
        if not any(name in self.banks or name in self.own for name in names):
            return hollow
        value = self.trained(arrival)
        if value is None:
            self.misfits.append(arrival.name)
            return None
        for name in names:
            if name in self.banks:
                with lent(self.banks[name].module, value):
                    self.look(self.banks[name])
                give_back_memory()
            if name in self.own and place.dim() == 2:
                self.look_at_own(name, value)
                self.own = {other: own for other, own in self.own.items() if own is not self.own[name]}
        return hollow

    def trained(self, arrival: Arrival) -> Tensor | None:
        """The weight as training saw it; None if its shape is not the model's."""
        assert self.recipe is not None
        value = arrival.value
        if not isinstance(value, Weight4) and value.is_floating_point() and value.dtype == self.recipe.read:
            value = value.to(self.recipe.seen)
        return self.incoming(replace(arrival, value=value))

    def look(self, bank: Bank) -> None:
        """Every adapter's update of one module."""
        others = {site.layer.key: site for site in bank.sites.get(SECOND, ())}
        for site in bank.sites.get(FIRST, ()):
            if isinstance(site.layer, BlockLayer) or not has_update(site):
                continue
            w_OI = site.layer.weight(torch.float32)
            update = update_of(site)
            found = self.layer(site.layer.key, site.method.r, update, state_of(site, update), w_OI)
            self.compare(site, found, others.get(site.layer.key))

    def look_at_own(self, name: str, value: Tensor) -> None:
        """The update of a matrix that the adapter trained whole."""
        path = name.rpartition(".")[0]
        module = self.adapters.model.get_submodule(path)
        if kind_of(module) is None:
            return
        layer = view(module, path)
        with lent(module, value):
            w_OI = layer.weight(torch.float32)
        update = Update(whole=layer.matrix(self.own[name].detach().float()) - w_OI)
        self.layer(path, min(w_OI.shape), update, zero_or_not(update), w_OI)

    # ---- without them ---------------------------------------------------------------------------------------

    def look_without(self) -> None:
        """What the adapter's own tensors say."""
        others = self.adapters.adapters[SECOND].sites if SECOND in self.adapters.adapters else {}
        for key, site in self.adapters.adapters[FIRST].sites.items():
            update = update_without(site)
            found = None
            if update is not None:
                found = self.layer(key, site.method.r, update, state_of(site, update), None)
            self.compare(site, found, others.get(key))

    def in_order(self) -> Walk:
        """The same, its lines by depth, then as the model has them; what is in no decoder layer comes last."""
        places = {key: at for at, key in enumerate(self.adapters.adapters[FIRST].sites)}

        def place(row: dict[str, Any]) -> tuple[float, float]:
            depth = math.inf if row["number"] is None else row["number"]
            return depth, places.get(row["name"], math.inf)

        self.layers.sort(key=place)
        self.pairs.sort(key=place)
        return self

    # ---- one layer ------------------------------------------------------------------------------------------

    def layer(self, key: str, r: int, update: Update, state: str, w_OI: Tensor | None) -> Spectrum | None:
        """A line of the table; returns the update's spectrum, or None if it is zero or not finite."""
        about: dict[str, Any] = {
            "name": key,
            "kind": kind_of_layer(key),
            "number": layer_number(key),
            "shape": list(update.shape),
            "r": r,
            "dense": update.whole is not None,
            "state": state,
        }
        about |= {"norm_W": frobenius(w_OI)} if w_OI is not None else {}
        self.layers.append(about)
        if state == "not finite":
            return None
        found = update.spectrum(max(r, LEADING))
        about |= spectrum_numbers(found)
        if not found.norm:
            return None
        if w_OI is not None:
            about |= self.against(w_OI, update, found, r, key) | {
                "ratio": found.norm / about["norm_W"] if about["norm_W"] else None
            }
        return found

    def against(self, w_OI: Tensor, update: Update, found: Spectrum, r: int, key: str) -> dict[str, Any]:
        """How an update lies in W: table 7, intruder dimensions, what 16 bits keep."""
        gen = torch.Generator().manual_seed(seed_of(0, name=key))
        count = directions(update, found, r)
        axes = Axes.of(w_OI, max(LEADING, count))
        inside = projections(w_OI, found, axes, count, gen)
        cosines = intruders(w_OI, update, found, axes, self.wanted.k)
        return {
            "exact": axes.whole,
            "projections": inside | {"r": count},
            "amplification": finite(found.norm / inside["update"] if inside["update"] else math.inf),
            "intruders": int((cosines < self.wanted.epsilon).sum()),
            "cosines": rounded(cosines),
            "rounding": {
                name: {"unchanged": kept.unchanged, "error": finite(kept.error)}
                for name, dtype in SIXTEEN.items()
                for kept in [rounding(w_OI, update, dtype)]
            },
        }

    def compare(self, site: Site, found: Spectrum | None, other: Site | None) -> None:
        """phi between two adapters on one layer."""
        if other is None:
            return
        update = update_of(site) if found is not None else None
        second = update_of(other) if found is not None else update_without(other)
        theirs = None
        if second is not None and second.finite:
            theirs = second.spectrum(max(other.method.r, LEADING))
        sides = {}
        own = [own_axes(one) for one in (site, other)] if not self.exported else [None, None]
        if own[0] is not None and own[1] is not None:
            sides = {"A": (own[0][0], own[1][0]), "B": (own[0][1], own[1][1])}
        if update and found and second and theirs and theirs.norm:
            one = found.first(directions(update, found, site.method.r))
            two = theirs.first(directions(second, theirs, other.method.r))
            sides |= {"V": (one.V, two.V), "U": (one.U, two.U)}
        if not sides:
            return
        key, number = site.layer.key, layer_number(site.layer.key)
        gen = torch.Generator().manual_seed(seed_of(1, name=key))
        whole = self.chosen is None or number in self.chosen
        self.pairs.append(
            {
                "name": key,
                "kind": kind_of_layer(key),
                "number": number,
                "sides": {side: side_numbers(u, v, gen, whole) for side, (u, v) in sides.items()},
                "other": spectrum_numbers(theirs) if theirs is not None else None,
            }
        )


def kind_of_layer(key: str) -> str:
    """The last part of a layer's name, such as q_proj, with the role of a fused projection."""
    return key.rpartition(".")[2]


# ---- numbers for the file -------------------------------------------------------------------------------------


def spectrum_numbers(found: Spectrum) -> dict[str, Any]:
    kept = found.s[: max(found.rank, 1)]
    return {
        "norm": found.norm,
        "singular_values": [float(f"{value:.6g}") for value in kept.tolist()[:LEADING]],
        "rank": found.rank,
        "effective_rank": found.effective_rank,
        "stable_rank": found.stable_rank,
    }


def side_numbers(u: Tensor, v: Tensor, gen: torch.Generator, whole: bool) -> dict[str, Any]:
    """phi of one side beside its control: two random Gaussian matrices of the same shapes."""
    phi_IJ, (i, j), size = similarity(u, v), (u.shape[1], v.shape[1]), len(u)
    drawn_IJ = drawn_similarity(i, j, size, gen)
    about = {
        "size": size,
        "first": float(phi_IJ[0, 0]),
        "diagonal": rounded(phi_IJ.diagonal()),
        "all": float(phi_IJ[-1, -1]),
        "expected": expected_similarity(i, j, size),
        "drawn": float(drawn_IJ[-1, -1]),
    }
    return about | ({"phi": rounded(phi_IJ), "control": rounded(drawn_IJ)} if whole else {})


def rounded(values: Tensor) -> Any:
    """Numbers to 4 places: phi and cosines go from 0 to 1."""
    if values.dim() > 1:
        return [rounded(row) for row in values]
    return [round(value, 4) for value in values.tolist()]


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


# ---- the walk -------------------------------------------------------------------------------------------------


@torch.no_grad()
def walk_base(recipe: Recipe, other: Path | None, wanted: Wanted, *, progress: bool = False) -> Walk:
    """Look at every layer while the base's files are read.

    raises  UserError if an adapter does not fit the base, or changes no weight
    """
    check_folder(recipe.folder, allow_pickle=recipe.allow_pickle)
    tokenizer = load_tokenizer(recipe.folder) if recipe.labels else None  # a causal model is made without
    model, task, more = made_of(recipe, tokenizer)
    adapters = Adapters(model, device="cpu")
    held = [(name, one) for name, one in ((FIRST, recipe.adapter), (SECOND, other)) if one is not None]
    for name, folder in held:
        load_adapter(adapters, folder, name, allow_pickle=recipe.allow_pickle, finite=False)
    refuse_unchanging(adapters, recipe.adapter)
    walk = Walk(adapters, wanted, recipe, folders=dict(held))
    given = {"dtype": recipe.read, "attn_implementation": "eager"} | more
    model, report = read_weights(recipe.folder, CLASSES[task], walk, given, progress=progress)
    heads = [f"{name}." for name in head_names(model)] if recipe.labels else []
    walk.notes += check_report(recipe.folder, report, heads, walk.misfits)
    return walk.in_order()


@torch.no_grad()
def walk_alone(folder: Path, other: Path | None, wanted: Wanted) -> Walk:
    """Look at what the adapters' own files say, without a base.

    raises  UserError if that is nothing
    """
    held = [(name, one) for name, one in ((FIRST, folder), (SECOND, other)) if one is not None]
    shapes: dict[str, nn.Module] = {}
    for _, one in held:
        shapes |= bare_layers(one)
    adapters = Adapters(tree(shapes), device="cpu")
    for name, one in held:
        read_as_peft(adapters, one, name)
    exported = any((one / OWN_WEIGHTS).is_file() for _, one in held)
    walk = Walk(adapters, wanted, exported=exported, folders=dict(held))
    walk.look_without()
    if not walk.layers and not walk.pairs:
        raise UserError(
            f"of {folder} nothing can be said without its base", hint="name it: --model ID_OR_FOLDER"
        )
    return walk.in_order()


def refuse_unchanging(adapters: Adapters, folder: Path) -> None:
    """
    raises  UserError for an adapter that changes no weight: prefixes, bottlenecks, biases alone
    """
    adapter: Adapter = adapters.adapters[FIRST]
    sites = [s for s in adapter.sites.values() if not isinstance(s.layer, BlockLayer) and has_update(s)]
    matrices = [tensor for _, tensor in adapters.overlaid(FIRST) if tensor.dim() == 2]
    if not sites and not matrices:
        raise UserError(
            f"{folder} holds a {adapter.spec.method}, which changes no matrix: it has no update to look at"
        )
