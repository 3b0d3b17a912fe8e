"""How an adapter's tensors stand in PEFT's file: the key and the shape of each.

q, k or v of a fused projection make one block: A is stacked, B has a column block for each role with zeros
elsewhere.

What PEFT has no tensors for is written as the plain LoRA that its pair is: A' = A, B' = out * B * e, all layers
with the same r, filled with zeros, and alpha = r, so that the scale is 1 for whoever reads one scale for all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .adapt import Adapters
from .adapter import Adapter
from .adapter_files import LORA, OWN, PEFT
from .errors import UserError
from .layers import Conv2dLayer, EmbeddingLayer, Layer
from .methods.base import LowRank, Pair, Site
from .peft_types import TYPES

PREFIX = "base_model.model."
PLAIN_LORA = {"A": "lora_A.weight", "B": "lora_B.weight"}


def kept(site: Site) -> set[str]:
    """The names of a site's tensors that belong in files."""
    return set(site.p) - site.method.working


def placed(site: Site) -> set[str]:
    """The names of a site's tensors that PEFT has a place for."""
    return set(site.p) & {*site.method.peft_keys, *site.method.peft_shared}


def file_tensors(adapters: Adapters, adapter: Adapter, form: str = PEFT) -> dict[str, Tensor]:
    """Every tensor of adapter_model.safetensors by its key, on the CPU, none sharing memory with another.

    Of an adapter that is being read, the tensors that PEFT's file has: an offset's A0 and B0 are in none.
    """
    tensors = exported(adapter) if form == LORA else own_places(adapter)
    for full_name, tensor in adapters.overlaid(adapter.name):
        tensors[overlay_key(adapter, full_name)] = tensor
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}


def own_places(adapter: Adapter) -> dict[str, Tensor]:
    """The method's tensors where PEFT has them."""
    tensors: dict[str, Tensor] = {}
    for module, sites in by_module(adapter).items():
        for name, tensor in block(sites).items():
            suffix = file_suffix(sites[0], name)
            tensors[file_key(adapter, module, sites[0], name)] = file_shape(sites[0].layer, suffix, tensor)
    return tensors


@torch.no_grad()
def exported(adapter: Adapter) -> dict[str, Tensor]:
    """The plain LoRA that the adapter's pairs are."""
    rows, tensors = export_rank(adapter), {}
    for module, sites in by_module(adapter).items():
        layer, pairs = sites[0].layer, [pair_of(site) for site in sites]
        a_RI = torch.cat([pair.A for pair in pairs])
        b_OR = torch.cat([s.layer.spread(folded(pair)) for s, pair in zip(sites, pairs)], dim=1)
        missing = rows - len(a_RI)
        for name, tensor in (("A", pad(a_RI, (0, 0, 0, missing))), ("B", pad(b_OR, (0, missing)))):
            suffix = embedded(layer, PLAIN_LORA[name])
            tensors[f"{PREFIX}{module}.{suffix}"] = file_shape(layer, suffix, tensor)
    return tensors


@torch.no_grad()
def export_rank(adapter: Adapter) -> int:
    """The most rows that a module's pairs have together."""
    return max(sum(len(pair_of(site).A) for site in sites) for sites in by_module(adapter).values())


def pair_of(site: Site) -> Pair:
    assert isinstance(site.method, LowRank)
    return site.method.pair(site.layer, site.p)


def folded(pair: Pair) -> Tensor:
    """out * B * e, (O, R)."""
    b_OR = pair.B * pair.e
    return b_OR if pair.out is None else pair.out[:, None] * b_OR


def by_module(adapter: Adapter) -> dict[str, list[Site]]:
    """The sites of each module: one, or one for each role."""
    table: dict[str, list[Site]] = {}
    for key, site in adapter.sites.items():
        table.setdefault(adapter.roles[key].name, []).append(site)
    return table


def file_key(adapter: Adapter, module: str, site: Site, name: str) -> str:
    """The key of a site's tensor; that of a shared one names no module."""
    if name in site.method.peft_shared:
        return TYPES[str(site.method.peft_type)].shared + site.method.peft_shared[name]
    return f"{PREFIX}{module}.{file_suffix(site, name)}"


def whole(sites: Sequence[Site]) -> bool:
    """Whether a module has one site, of all its rows."""
    return len(sites) == 1 and sites[0].layer.rows is None


def file_suffix(site: Site, name: str) -> str:
    return embedded(site.layer, (site.method.peft_keys | site.method.peft_shared)[name])  # type: ignore[operator]


def embedded(layer: Layer, suffix: str) -> str:
    """On an embedding PEFT says so: lora_A.weight is lora_embedding_A there, and hira_A hira_embedding_A."""
    return (
        re.sub(r"_([AB])(\.weight)?$", r"_embedding_\1", suffix)
        if isinstance(layer, EmbeddingLayer)
        else suffix
    )


def file_shape(layer: Layer, suffix: str, tensor: Tensor) -> Tensor:
    """A tensor in the shape of PEFT's file.

    Of a convolution A is (r, I, kernel), B is (O, r, 1, 1) and DoRA's magnitude (1, O, 1, 1). AdaLoRA, which
    multiplies B and A before it convolves, leaves them as matrices, and keeps its values as (r, 1).
    """
    if suffix == "lora_E":
        return tensor.reshape(-1, 1)
    if not isinstance(layer, Conv2dLayer):
        return tensor
    if suffix == "lora_magnitude_vector":
        return tensor.reshape(1, -1, 1, 1)
    if suffix in ("lora_A.weight", "hira_A"):
        return tensor.reshape(len(tensor), *layer.whole_weight().shape[1:])
    return tensor[..., None, None] if suffix in ("lora_B.weight", "hira_B") else tensor


def overlay_key(adapter: Adapter, full_name: str) -> str:
    """A module trained whole keeps its name; the bias of an adapted layer stands under base_layer."""
    module, _, leaf = full_name.rpartition(".")
    adapted = {target.name for target in adapter.roles.values()}
    return f"{PREFIX}{module}.base_layer.{leaf}" if module in adapted else PREFIX + full_name


def block(sites: Sequence[Site]) -> dict[str, Tensor]:
    """The tensors of a whole module that PEFT has: a site's own, or A stacked and B in blocks for several roles."""
    if whole(sites):
        names = placed(sites[0]) & kept(sites[0])
        return {name: tensor for name, tensor in sites[0].p.items() if name in names}
    return {
        "A": torch.cat([site.p["A"] for site in sites]),
        "B": torch.cat([site.layer.spread(site.p["B"]) for site in sites], dim=1),
    }


def unblock(sites: Sequence[Site], held: Mapping[str, Tensor], where: str) -> list[dict[str, Tensor]]:
    """The inverse of `block`.

    raises  UserError if B is not zero outside the roles' rows
    """
    if whole(sites):
        return [dict(held)]
    sizes = [site.method.r for site in sites]
    parts, rest = [], held["B"].clone()
    for site, a, b in zip(sites, held["A"].split(sizes), held["B"].split(sizes, dim=1)):
        assert site.layer.rows is not None
        rows = site.layer.rows.cpu()
        parts.append({"A": a, "B": b[rows]})
    start = 0
    for site, size in zip(sites, sizes):
        rest[site.layer.rows.cpu(), start : start + size] = 0  # type: ignore[union-attr]
        start += size
    if rest.any():
        raise UserError(f"{where}: B is not zero outside the rows of the roles that {OWN} names")
    return parts


def tidied(tensors: Mapping[str, Tensor], shared: Collection[str] = ()) -> dict[str, Tensor]:
    """A file's tensors without what PEFT writes twice.

    With `bias="all"` these are, under the names of its own wrappers, the biases of modules that are trained whole,
    and of the originals that they replace. RandLoRA's bases, whose keys are `shared`, stand once more for each layer.
    """
    plain = {key: tensor for key, tensor in tensors.items() if ".original_module." not in key}
    names = {key: re.sub(r"\.modules_to_save\.[^.]+\.", ".", key) for key in plain}
    tidy = {name: plain[name if name in plain else key] for key, name in names.items()}
    once = {key.rpartition(".")[2]: tidy[key] for key in shared if key in tidy}
    for key, tensor in list(tidy.items()):
        first = once.get(key.rpartition(".")[2])
        if key not in shared and first is not None and torch.equal(tensor, first):
            del tidy[key]
    return tidy


def base_copy(model: nn.Module, key: str) -> Tensor | None:
    """The base's parameter that a key of the file names: PEFT writes whole tables beside adapted ones."""
    path = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    return dict(model.named_parameters(remove_duplicate=False)).get(path)
