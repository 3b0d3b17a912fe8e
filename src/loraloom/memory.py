"""Bytes of a training step on a GPU, predicted by taking the step on shapes.

The model is built on the meta device, the adapters are attached, and the real training step runs on it while a tape
counts what is alive. Nothing about an architecture is written here. Decoder layers are alike, so two short models
are traced, and every phase of the step is a straight line in the number of layers:

    peak = max over phases of  p(3) + (L - 3) (p(4) - p(3))

The optimizer is a stand-in that holds the bytes of the real one's state and takes its temporaries.

units   bytes; L layers
source  tests/test_memory.py: the line equals a full trace; benchmarks/plan_peak.py: measured on a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import Adapters
from .adapter import Adapter
from .config import RunConfig, TrainConfig, with_values
from .errors import UserError
from .incoming import quantize_model
from .kernels.matmul_frozen import release_buffers
from .model import DTYPES
from .optim import sgd_has_no_moments, split_decay
from .optim8 import host_bytes, staging_bytes, state_bytes
from .packing import Batch
from .products8 import use_fp8
from .quant import Weight4, stored_bytes
from .recompute import apply, fuse
from .sdpa import Kernel, fused_attention
from .skeleton import decoder_layers, meta_model, num_layers, text_config
from .step import train_step
from .targets import layer_number
from .trace import BACKWARD, Shapes, Tape, in_backward
from .workshop import any_ids, spec_of

# What torch takes beside tensors: a workspace of cuBLAS for each of two threads, forward and backward.
CUBLAS = 2 * 32 * 2**20  # of Hopper: parseChosenWorkspaceSize in CUDABlas.cpp of torch 2.11
CONTEXT = 600 * 2**20  # the driver's context and torch's kernels; not in torch.cuda.max_memory_allocated
FRAGMENTS = 0.06  # of what comes and goes: reserved over allocated in packed runs of several libraries

SHORT, LONG = 3, 4  # layers of the two models traced: a first, a second and a last one, and one between them


def tier(config: RunConfig) -> str:
    """The recomputation that the settings ask for; none where it is still open."""
    return "none" if config.train.recompute == "auto" else config.train.recompute


def dtype_of(config: RunConfig) -> torch.dtype:
    """The base's number format on a GPU."""
    return DTYPES.get(config.model.dtype, torch.bfloat16)


@dataclass(frozen=True)
class Prediction:
    """The most bytes that tensors of a step take at once, when, and of what."""

    peak: int
    phase: str
    parts: dict[str, int]  # at the peak, by trace.PARTS
    phases: dict[str, int] = field(default_factory=dict)  # the most bytes of each phase

    @property
    def allocated(self) -> int:
        """What torch.cuda.max_memory_allocated would say."""
        return self.peak + CUBLAS

    @property
    def needed(self) -> int:
        """What the GPU must have free before the process starts."""
        moving = self.parts["activations"] + self.parts["workspace"] + self.parts["gradients"]
        return self.allocated + CONTEXT + int(FRAGMENTS * moving)


@dataclass(frozen=True)
class Rig:
    """A model of shapes with its adapter and a stand-in for the optimizer."""

    model: Any
    adapters: Adapters
    adapter: Adapter
    optimizer: StandIn


class StandIn:
    """Holds what an optimizer's state takes on the GPU, and takes what a step of it does."""

    def __init__(self, groups: list[dict[str, Any]], config: TrainConfig) -> None:
        if config.paged and config.optimizer == "sgd":
            raise sgd_has_no_moments()
        self.param_groups = split_decay(groups, config.weight_decay)
        self.name, self.paged, self.state = config.optimizer, config.paged, []
        for group in self.param_groups:
            sizes = [p.numel() for p in group["params"]]
            on_host = [host_bytes(self.name, n) if config.paged else 0 for n in sizes]
            moments = [(state_bytes(self.name, n) - host) for n, host in zip(sizes, on_host)]
            halves = [half for one in moments for half in (one // 2, one - one // 2)]
            self.state += [room(size) for size in halves if size]
            if any(on_host):
                self.state.append(room(staging_bytes(self.name, sizes)))

    def step(self) -> None:
        """Paged AdamW keeps the roots of a group's second moments, SGD its decayed gradients.

        torch's AdamW is one kernel on a GPU and keeps nothing, nor does the one in 8 bits.
        """
        for group in self.param_groups:
            if (self.name == "adamw" and self.paged) or (self.name == "sgd" and group["weight_decay"]):
                kept = [torch.empty_like(p) for p in group["params"]]
                del kept

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def room(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="meta")


class Predictor:
    """Predicts steps of one run's model, adapter and optimizer; its models are built once.

    shape   the model's transformers config
    cudnn   whether the GPU's torch prefers cuDNN's attention (Hopper, Blackwell)
    kernel  an attention kernel, instead of the one that torch would choose
    whole   a rig of the whole model that is there already, to count its weights

    raises  UserError for settings that do not fit the model, or a model whose steps depend on more than shapes
    """

    def __init__(
        self,
        config: RunConfig,
        shape: Any,
        *,
        cudnn: bool = True,
        kernel: Kernel | None = None,
        whole: Rig | None = None,
    ) -> None:
        self.config, self.shape, self.cudnn, self.kernel = config, shape, cudnn, kernel
        self._rigs: dict[int, Rig] = {}
        self._known: dict[Any, Prediction] = {}
        self._tiers: dict[str, Predictor] = {tier(config): self}
        self.num_layers = num_layers(shape)
        self.whole = whole or self.rig(self.num_layers)

    def at(self, tier: str) -> Predictor:
        """The same run with another recomputation.

        raises  UserError if this model cannot
        """
        if tier not in self._tiers:
            config = with_values(self.config, {"train.recompute": tier})
            other = Predictor(config, self.shape, cudnn=self.cudnn, kernel=self.kernel, whole=self.whole)
            other.rig(SHORT if other.straight else other.num_layers)
            other._tiers = self._tiers
            self._tiers[tier] = other
        return self._tiers[tier]

    def rig(self, layers: int) -> Rig:
        if layers not in self._rigs:
            self._rigs[layers] = build(self.config, self.shape, layers, eight=self.cudnn)
        return self._rigs[layers]

    def predict(self, batches: Sequence[Batch], *, whole: bool = False) -> Prediction:
        """The peak of a step over these micro-batches; two stand for any larger number.

        whole  trace every layer
        """
        batches = batches[:2]
        key = whole, *((made.ids.shape, made.targets, made.documents.lengths) for made in batches)
        if key not in self._known:
            phases = (
                self.line(batches) if self.straight and not whole else self.trace(self.num_layers, batches)
            )
            self._known[key] = highest(phases)
        return self._known[key]

    @cached_property
    def straight(self) -> bool:
        """Whether two short models tell of the whole one."""
        return self.num_layers > LONG and alike(self.whole)

    def line(self, batches: Sequence[Batch]) -> dict[str, dict[str, int]]:
        """The parts at the highest point of each phase, from two short models."""
        low, high = self.trace(SHORT, batches), self.trace(LONG, batches)
        more = self.num_layers - SHORT
        return {
            phase: {part: size + more * (high[phase][part] - size) for part, size in parts.items()}
            for phase, parts in low.items()
        }

    def trace(self, layers: int, batches: Sequence[Batch]) -> dict[str, dict[str, int]]:
        """The parts at the highest point of each phase."""
        rig, tape = self.rig(layers), Tape()
        release_buffers()
        tape.hold([*rig.model.parameters(), *rig.model.buffers()], "base")
        tape.hold(rig.adapters.named_tensors().values(), "adapters")
        tape.hold(rig.optimizer.state, "optimizer")
        parameters = rig.adapters.parameters()

        def ready() -> None:
            tape.hold([p.grad for p in parameters if p.grad is not None], "gradients")
            tape.phase = "update"

        attention = fused_attention(cudnn=self.cudnn, kernel=self.kernel)
        with phases(rig.model, tape), Shapes(), tape, attention:
            try:
                train_step(
                    rig.model,
                    rig.adapters,
                    rig.optimizer,  # type: ignore[arg-type]
                    batches,
                    step=1,
                    num_steps=2,
                    max_norm=self.config.train.max_grad_norm,
                    inspect=ready,
                )
            except RuntimeError as error:  # NotImplementedError among them
                raise unpredictable(rig.model, error) from error
        release_buffers()
        return {phase: tape.by_part(peak.when) for phase, peak in tape.peaks.items() if phase != "middle"}


def build(config: RunConfig, shape: Any, layers: int, *, eight: bool = True) -> Rig:
    """The first layers of a model on the meta device, quantised and with its adapter as the settings ask for.

    eight  whether the GPU multiplies 8-bit floats
    """
    m = config.model
    model = meta_model(shape, dtype=dtype_of(config), attention=m.attention, layers=layers)
    if m.quantize != "none":
        quantize_model(
            model, m.quantize, block=m.quant_block, double=m.double_quant, keep=config.modules_to_save
        )
        use_fp8(model, m.fp8 is True or (m.fp8 == "auto" and eight), torch.device("meta"))
    adapters = Adapters(model)
    with torch.device("meta"), Shapes():
        adapter = adapters.add(
            "default", spec_of(with_values(config, any_ids(config))), blank=True, starting=True
        )
    fuse(adapters, config.train, gpu=True)
    apply(model, adapters, tier(config))
    adapters.train()
    return Rig(model, adapters, adapter, StandIn(adapters.groups(1.0), config.train))


def unpredictable(model: nn.Module, error: Exception) -> UserError:
    return UserError(
        f"the memory of {type(model).__name__} cannot be predicted: the size of what it computes depends on numbers",
        details=[str(error).splitlines()[0]],
        hint="train with a small train.micro_tokens, and raise it while memory lasts",
    )


def highest(phases: dict[str, dict[str, int]]) -> Prediction:
    totals = {phase: sum(parts.values()) for phase, parts in phases.items()}
    phase = max(totals, key=totals.__getitem__)
    return Prediction(totals[phase], phase, phases[phase], totals)


def alike(rig: Rig) -> bool:
    """Whether all decoder layers have the same weights and adapters, and the config tells none of them apart."""
    if decoder_layers(rig.model) is None:
        return False
    count = num_layers(rig.model.config)
    told = [
        v for v in vars(text_config(rig.model.config)).values() if isinstance(v, list) and len(v) == count
    ]
    if any(any(item != values[0] for item in values) for values in told):
        return False
    layers: dict[int, list[tuple[str, Any, bool]]] = {}
    for name, tensor in [*rig.model.named_parameters(), *rig.adapters.named_parameters()]:
        number = layer_number(name.rpartition("|")[2].replace("/", "."))
        if number is not None:
            about = (name.replace(str(number), "*", 1), tensor.shape, isinstance(tensor, Weight4))
            layers.setdefault(number, []).append(about)
    return len({str(sorted(map(str, about))) for about in layers.values()}) == 1


@contextmanager
def phases(model: nn.Module, tape: Tape) -> Iterator[None]:
    """Name what the step is at: a layer, forward or backward, or what lies before, between and after.

    Of the layers only the ends have names: what lies between them is never higher than both.
    """
    layers = decoder_layers(model) or nn.ModuleList()
    last = len(layers) - 1
    handles = []
    tape.phase = "input"

    def enter(way: str, index: int) -> None:
        place = {0: "first", 1: "second", last: "last"}
        tape.phase = f"{way}, {place[index]} layer" if index in place else "middle"

    def entered(index: int) -> Callable[..., None]:
        return lambda *_: None if in_backward() else enter("forward", index)  # recomputation is backward's

    def left(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if in_backward():
                return
            if index == last:
                tape.phase = "head and loss"
            if hidden.requires_grad:
                hidden.register_hook(lambda _: enter(BACKWARD, index))

        return hook

    for index, layer in enumerate(layers):
        handles += [layer.register_forward_pre_hook(entered(index)), layer.register_forward_hook(left(index))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stored(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors, each counted once, without rounding."""
    return sum(stored_bytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())
