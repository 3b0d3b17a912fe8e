"""What becomes of each weight that a checkpoint brings: quantised or not, it goes to its device at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .errors import NonFinite, UserError
from .layers import Conv1DLayer, is_linear, kind_of
from .on_load import Arrival, kept_modules
from .quant import Weight4, dense, quantized
from .targets import output_head

EXPERTS = "experts"  # the name of a module that holds the fused weights (E, O, I) of all experts


@dataclass
class Incoming:
    """Takes the weights one after the other.

    table  nf4, fp4, e2m1 or fp8 for the linear layers; None leaves them as they come
    keep   ends of module names that stay in 16 bits, such as a head to be trained whole
    plain  only layers of torch's and transformers' own classes, which are those that bitsandbytes replaces
    """

    device: torch.device
    table: str | None = None
    block: int = 64
    double: bool = True
    keep: Sequence[str] = ()
    plain: bool = False
    experts: list[str] = field(default_factory=list)  # fused experts that stayed in 16 bits
    misfits: list[str] = field(default_factory=list)  # weights of another shape than the model's

    def __call__(self, arrival: Arrival) -> Tensor | None:
        value = arrival.value.to(self.device)
        turned = kind_of(arrival.module) is Conv1DLayer
        if isinstance(value, Weight4) and turned:
            value = value.T  # checkpoints in 4 bits hold every matrix as (O, I)
        if isinstance(value, Weight4) and self.keeps(arrival):
            value = dense(value)
        if value.shape != getattr(arrival.module, arrival.name.rpartition(".")[2]).shape:
            self.misfits.append(arrival.name)
            return None
        if self.table is None or isinstance(value, Weight4) or not self.is_meant(arrival):
            return value
        try:
            return quantized(value, table=self.table, block=self.block, double=self.double, flipped=turned)
        except ValueError as error:
            raise broken(arrival.name, value, self.table) from error

    def is_meant(self, arrival: Arrival) -> bool:
        """Whether a weight is to be quantised: linear layers but the head, and fused experts."""
        path, _, leaf = arrival.name.rpartition(".")
        if arrival.kept or any(
            path == k or path.endswith("." + k) or f".{k}." in f".{path}." for k in self.keep
        ):
            return False
        if path.rpartition(".")[2] == EXPERTS and arrival.value.dim() == 3:
            if runs_one_by_one(arrival.model):
                return True
            self.experts.append(arrival.name)
            return False
        if leaf != "weight" or not is_linear(arrival.module):
            return False
        if self.plain:
            return type(arrival.module) is nn.Linear or kind_of(arrival.module) is Conv1DLayer
        return multiplies(arrival.module)

    def keeps(self, arrival: Arrival) -> bool:
        """Whether a weight stands in a module that the caller wants in 16 bits."""
        path = f".{arrival.name.rpartition('.')[0]}."
        return any(path.endswith(f".{name}.") or f".{name}." in path for name in self.keep)


def multiplies(module: nn.Module) -> bool:
    """Whether a linear layer does with its weight what nn.Linear does; a router or a grouped product does not."""
    if kind_of(module) is Conv1DLayer:
        return True
    return type(module).forward is nn.Linear.forward or type(module).__name__ == "FalconLinear"


def runs_one_by_one(model: nn.Module) -> bool:
    """Whether transformers can run this model's experts one after the other, which quantised ones need."""
    asks = getattr(type(model), "_can_set_experts_implementation", None)
    return bool(asks is not None and asks())


def broken(name: str, value: Tensor, table: str) -> UserError:
    """The error for a weight that cannot be quantised."""
    bad = int((~value.isfinite()).sum())
    hint = "the checkpoint is broken; fetch it again, or convert it anew"
    if value.dtype == torch.float16:
        hint = "they may be too large for float16: set model.dtype=bfloat16; or " + hint
    kept = "8-bit floats" if table == "fp8" else "4 bits"
    return NonFinite(f"{name} holds {bad:,} values that are not finite, which {kept} cannot keep", hint=hint)


def settle(model: nn.Module, device: torch.device) -> None:
    """Bring what no checkpoint brought to the device too: buffers, and a new head."""
    moved: dict[int, nn.Parameter] = {}  # by the id of what stood there: a tied weight stays one
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
        for name, own in module._parameters.items():
            if own is not None and own.device != device and own.device.type != "meta":
                if id(own) not in moved:
                    moved[id(own)] = nn.Parameter(own.detach().to(device), requires_grad=False)
                module._parameters[name] = moved[id(own)]


@torch.no_grad()
def quantize_model(
    model: nn.Module, table: str = "nf4", *, block: int = 64, double: bool = True, keep: Sequence[str] = ()
) -> nn.Module:
    """Put the linear layers and fused experts of a model that is in memory, or on meta, into 4 bits, or 8.

    The head, and what is tied to it, stays as it is, as when a checkpoint is read.
    """
    head, named = (
        output_head(model),
        kept_modules(model) if hasattr(model, "_keep_in_fp32_modules") else set(),
    )
    take = Incoming(torch.device("cpu"), table=table, block=block, double=double, keep=keep)
    for path, module in model.named_modules():
        for leaf, own in list(module._parameters.items()):
            if own is None or isinstance(own, Weight4):
                continue
            name = f"{path}.{leaf}" if path else leaf
            take.device = own.device
            tied = head is not None and own is getattr(head, "weight", None)
            kept = module is head or tied or path in named
            value = take(Arrival(model, name, module, own.detach(), kept))
            if isinstance(value, Weight4):
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    if any(isinstance(p, Weight4) and p.codes.experts for p in model.parameters()):
        model.set_experts_implementation("eager")  # type: ignore[operator]
    return model
