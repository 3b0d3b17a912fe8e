"""AdamW whose moments take little of the GPU's memory: in 8 bits, in the host's memory, or both.

    bytes a parameter     moments     of them on the host when paged
    adamw                 8           8
    adamw8bit             2 + 1/32    2

Parameters of fewer than MIN_SIZE elements keep float32 moments, and those of fewer than PAGED_FROM keep them on
the GPU: the limits of bitsandbytes. So at low rank little is paged: an A or B of r = 16 on a layer of width 4096
has 65,536 elements. The scales of 8-bit moments stay on the GPU, and the slots that paged moments pass through
take `staging_bytes` of it. The allocator of pinned memory rounds each tensor up to a power of two.

Float32 moments are moved by torch's own AdamW, under its names `exp_avg` and `exp_avg_sq`, so paging changes no bit;
8-bit ones (`exp_avg_code`, `exp_avg_absmax` ...) by `kernels.adamw8`. `step` is a tensor on the CPU, as in torch.
16-bit parameters have float32 moments here, unlike in torch; float64 ones keep float64 moments.

source  Dettmers et al. 2022, arXiv:2110.02861; QLoRA, arXiv:2305.14314, section 3
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .kernels.adamw8 import Operands, adamw8, num_blocks
from .kernels.scales8 import BLOCK8
from .paging import PIECE, SLOTS, CudaLanes, Lanes, Load, Pager, Pair, cut, padded

MIN_SIZE = 4096  # elements from which a parameter's moments are kept in 8 bits
PAGED_FROM = 100_000  # elements from which they are kept on the host
MOMENTS = ("exp_avg", "exp_avg_sq")


class Part(NamedTuple):
    """A run of elements of one parameter, its gradient, and the number of this step, from 1."""

    parameter: Tensor
    grad: Tensor
    start: int
    stop: int
    step: int

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == self.parameter.numel()

    def of(self, tensor: Tensor) -> Tensor:
        """These elements of a contiguous tensor of the parameter's shape; in one dimension if they are not all."""
        return tensor if self.is_whole else tensor.view(-1)[self.start : self.stop]

    def write(self, values: Tensor) -> None:
        """Put the elements into the parameter, whatever its strides and dtype."""
        if self.is_whole:
            self.parameter.copy_(values)
        else:
            every = self.parameter.contiguous()
            self.of(every).copy_(values)
            self.parameter.copy_(every)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments in 8 bits (or 32), on the parameters' device or `paged` in the host's memory.

    raises  ValueError if state is to be paged for parameters that are not all on one CUDA device
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_size: int = MIN_SIZE,
        paged: bool = False,
        bits: int = 8,
        lanes: Lanes | None = None,
    ) -> None:
        if bits not in (8, 32):
            raise ValueError(f"moments are kept in 8 or 32 bits, not {bits}")
        self.bits, self.min_size = bits, min_size
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.pager: Pager | None = None
        if paged:
            devices = {p.device for group in self.param_groups for p in group["params"]}
            if len(devices) != 1:
                raise ValueError(f"state is paged to one GPU, not to {sorted(map(str, devices))}")
            self.pager = Pager(lanes or CudaLanes(devices.pop()))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; `finish` says when paged state is back on the host."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        loads: list[Load] = []
        for group in self.param_groups:
            here: list[Part] = []
            away: list[Part] = []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (away if self.on_host(parameter) else here).append(self.whole(parameter))
            self.update(group, here, [self.moments(part) for part in here])
            for pieces in cut([part.stop for part in away], PIECE // (self.bits // 8)):
                parts = [away[index]._replace(start=start, stop=stop) for index, start, stop in pieces]
                loads.append(Load([self.moments(part) for part in parts], partial(self.update, group, parts)))
            if here or away:
                torch._foreach_add_([self.state[part.parameter]["step"] for part in (*here, *away)], 1)
        if self.pager is not None:
            self.pager.run(loads)
        return loss

    def whole(self, parameter: Tensor) -> Part:
        """The parameter at its next step; its state is made at the first."""
        state = self.state[parameter]
        if not state:
            state.update(self.new_state(parameter))
        assert parameter.grad is not None
        return Part(parameter, parameter.grad, 0, parameter.numel(), int(state["step"]) + 1)

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = {"step": torch.tensor(0.0)}
        for name in MOMENTS:
            if self.in_8_bits(parameter):
                state[f"{name}_code"] = self.zeros(parameter, torch.uint8)
                blocks = num_blocks(parameter.numel())
                state[f"{name}_absmax"] = torch.zeros(blocks, device=parameter.device)
            else:
                state[name] = self.zeros(parameter, torch.promote_types(parameter.dtype, torch.float32))
        return state

    def zeros(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """A moment of a parameter, where it lives."""
        if self.pager is not None and self.on_host(parameter):
            return self.pager.lanes.host(parameter.shape, dtype)
        return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)

    def in_8_bits(self, parameter: Tensor) -> bool:
        return self.bits == 8 and parameter.numel() >= self.min_size and parameter.dtype != torch.float64

    def on_host(self, parameter: Tensor) -> bool:
        return self.pager is not None and parameter.numel() >= PAGED_FROM

    def moments(self, part: Part) -> Pair:
        """A part's two moments where they live; a piece of a parameter in one dimension."""
        state = self.state[part.parameter]
        first, second = ("exp_avg", "exp_avg_sq")
        if self.in_8_bits(part.parameter):
            first, second = ("exp_avg_code", "exp_avg_sq_code")
        return part.of(state[first]), part.of(state[second])

    def update(self, group: dict[str, Any], parts: Sequence[Part], moments: Sequence[Pair]) -> None:
        """Move parts by their gradients and their moments, which are on the same device."""
        rule = {key: group[key] for key in ("lr", "weight_decay", "eps")}
        narrow: dict[int, list[Operands]] = {}
        wide: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        copies: list[tuple[Part, Tensor]] = []
        for part, (m, v) in zip(parts, moments):
            dtype = part.parameter.dtype if m.dtype == torch.uint8 else m.dtype
            p, grad = part.of(part.parameter.to(dtype).contiguous()), part.of(part.grad.contiguous())
            if not part.parameter.is_contiguous() or part.parameter.dtype != dtype:
                copies.append((part, p))
            if m.dtype == torch.uint8:
                narrow.setdefault(part.step, []).append((p, grad, m, v, *self.scales(part)))
            else:
                wide.append((p, grad.to(dtype), m, v, torch.tensor(part.step - 1.0)))
        for step, operands in narrow.items():
            adamw8(operands, betas=group["betas"], step=step, **rule)
        if wide:
            ps, grads, ms, vs, steps = (list(column) for column in zip(*wide))
            beta1, beta2 = group["betas"]
            fixed: dict[str, Any] = {"amsgrad": False, "maximize": False}
            adamw(ps, grads, ms, vs, [], steps, beta1=beta1, beta2=beta2, **rule, **fixed)
        for part, p in copies:
            part.write(p)

    def scales(self, part: Part) -> Pair:
        """The scales of a part's 8-bit moments; parts are cut where blocks end."""
        state = self.state[part.parameter]
        first, second = state["exp_avg_absmax"], state["exp_avg_sq_absmax"]
        if part.is_whole:
            return first, second
        blocks = slice(part.start // BLOCK8, num_blocks(part.stop))
        return first[blocks], second[blocks]

    def finish(self) -> None:
        """Wait until what `step` queued is done, so that the state can be read."""
        if self.pager is not None:
            self.pager.finish()

    def put(self, parameter: Tensor, key: str, value: Tensor) -> None:
        """Set one tensor of a parameter's state, bit for bit, where such a tensor lives."""
        if key == "step":
            kept = value.detach().cpu().clone()
        elif key.endswith("_absmax"):
            kept = value.detach().to(parameter.device, copy=True)
        else:
            kept = self.zeros(parameter, value.dtype).copy_(value.detach())
        self.state[parameter][key] = kept

    def state_dict(self) -> dict[str, Any]:
        self.finish()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would turn codes into floats and bring paged state onto the GPU."""
        self.finish()
        super().load_state_dict({**state_dict, "state": {}})
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, parameters):
            for key, value in state_dict["state"].get(number, {}).items():
                self.put(parameter, key, value)


class PagedAdamW(AdamW8bit):
    """AdamW with float32 moments in the host's memory, bit for bit torch.optim.AdamW."""

    def __init__(self, params: Iterable[Any], *args: Any, **options: Any) -> None:
        super().__init__(params, *args, bits=32, paged=True, **options)


def state_bytes(optimizer: str, numel: int) -> int:
    """Bytes of state of one float32 parameter, wherever they are; the count of its steps is left out.

    raises  ValueError if there is no such optimizer
    """
    match optimizer:
        case "adamw":
            return 8 * numel
        case "adamw8bit":
            return 8 * numel if numel < MIN_SIZE else 2 * numel + 8 * num_blocks(numel)
        case "sgd":
            return 4 * numel  # with momentum
    raise ValueError(f"there is no optimizer {optimizer!r}")


def host_bytes(optimizer: str, numel: int) -> int:
    """How many of them paging keeps on the host."""
    if numel < PAGED_FROM or optimizer == "sgd":
        return 0
    return 2 * numel * element_bytes(optimizer)


def staging_bytes(optimizer: str, numels: Sequence[int]) -> int:
    """Bytes of the GPU that the slots of a paged optimizer take, for one group of parameters of these sizes."""
    size = element_bytes(optimizer)
    loads = cut([numel for numel in numels if numel >= PAGED_FROM], PIECE // size)
    longest = max((sum(padded(stop - start) for _, start, stop in load) for load in loads), default=0)
    return 2 * SLOTS * longest * size


def element_bytes(optimizer: str) -> int:
    return 1 if optimizer == "adamw8bit" else 4
