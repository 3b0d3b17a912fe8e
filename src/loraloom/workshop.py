"""From settings to what a training loop works with: model, data, adapters, optimizer, plan.

Everything that was `auto` is decided here, with the reason, and stored in the run's settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from . import methods
from .adapt import Adapters
from .adapter import AdapterSpec
from .beside import Beside
from .compiling import compile_layers, compile_seconds, uncompile
from .config import RunConfig, with_values
from .data import Examples, Labelled, Prepared, Style, check_sources, prepare
from .errors import DataError, UserError
from .files import digest
from .generate import reach
from .graphs import Graphs, graph_reason, make_graphs
from .kernels.twin import path_of
from .layers import BlockLayer
from .methods.base import Method
from .model import Base, Loaded, find_base, load_model
from .nll import honours_boundaries, why_whole_logits
from .opening import Tell, tell_data, tell_method, tell_model, unheard
from .optim import make_optimizer
from .originals import read_originals
from .packing import DEFAULT_BATCH, StepPlan, pack
from .prepare import prepare as prepare_method
from .products8 import plain_products
from .progress import doing
from .recompute import Choice, apply, fuse
from .skeleton import decoder_layers, read_shape

UNLIMITED = 1 << 20  # tokens, for a model that names no limit
# Of a pass, if the settings leave it open: on a GPU, on one with room for more, and on a CPU.
GPU_TOKENS, LONG_TOKENS, CPU_TOKENS = 8192, 16384, 2048


Fit = Callable[[RunConfig, Loaded, Examples, StepPlan], Choice]


@dataclass
class Workshop:
    """Everything a run works with. The model is frozen and in eval mode; only adapters train."""

    config: RunConfig
    loaded: Loaded
    adapters: Adapters
    prepared: Prepared | Labelled
    optimizer: torch.optim.Optimizer
    plan: StepPlan
    decided: dict[str, Any]  # dotted settings that were `auto`
    execution: dict[str, str]  # what computes a step: attention, layers, loss ..., in words with the reason
    graphs: Graphs | None = None  # of short passes
    told: set[str] = field(default_factory=set)  # by `fresh_notes`

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def train(self) -> Any:
        return self.prepared.train

    @property
    def eval(self) -> Any:
        return self.prepared.eval

    @property
    def evaluates(self) -> bool:
        return len(self.prepared.eval) > 0

    @property
    def style(self) -> Style:
        assert isinstance(self.prepared, Prepared)
        return Style.from_dict(self.prepared.report.style)

    @property
    def packing(self) -> bool:
        return self.config.data.packing

    @property
    def micro_tokens(self) -> int:
        assert isinstance(self.config.train.micro_tokens, int)
        return self.config.train.micro_tokens

    @property
    def eval_every(self) -> int:
        assert self.config.eval.every != "auto"
        return self.config.eval.every

    @property
    def pad_id(self) -> int:
        return self.loaded.pad_id

    @property
    def stop_ids(self) -> Sequence[int]:
        return self.loaded.stop_ids

    def fresh_notes(self) -> list[str]:
        """What only the first steps show, in words; each once."""
        found: list[str] = []
        if self.graphs is not None and self.graphs.stopped:
            found.append(f"CUDA graphs: no more of them: {self.graphs.stopped}")
        if self.config.train.compile and not self.told:
            found.append(f"compiling took {compile_seconds():.1f} s of the first step")
        fresh = [note for note in found if note not in self.told]
        self.told.update(fresh)
        return fresh

    @cached_property
    def base_norms(self) -> dict[str, float]:
        """||W|| of each adapted layer by its key: the base is frozen, so once is enough."""
        adapter = next(iter(self.adapters.adapters.values()))
        return {
            key: float(site.layer.weight().float().norm())
            for key, site in adapter.sites.items()
            if not isinstance(site.layer, BlockLayer)
        }

    def data_digest(self) -> str:
        """Of every token and label, trained on or held out: a resumed run must see the same."""
        parts = [tensor for side in (self.train, self.eval) for tensor in side.parts]
        return digest(*(part.numpy().tobytes() for part in parts))


def build(
    config: RunConfig,
    *,
    offline: bool = False,
    cache: Path | None = None,
    progress: bool = True,
    fit: Fit | None = None,
    fresh: bool = True,
    tell: Tell = unheard,
) -> Workshop:
    """Load, read, attach and plan.

    fit    chooses what is computed again, and the tokens of a pass where they are not set, by a GPU's memory
    fresh  whether training starts here, so that a method sees what it must first; else a checkpoint follows
    tell   told the first lines of a run

    raises  UserError, DataError: whatever of the settings, the data or the model does not fit
    """
    check_sources(config.data, offline=offline)  # a wrong path is said before a large model is loaded
    method = spec_of(config).make()
    base = find_base(config.model, offline=offline, progress=progress)
    tell_model(tell, config, base)
    how: dict[str, Any] = {"cache": cache, "offline": offline, "progress": progress, "tell": tell}
    loaded, prepared = load_and_read(config, method, base, **how)
    written = as_ids(config, type(method), loaded.tokenizer)
    config = with_values(config, written)
    adapters = Adapters(loaded.model)
    adapter = adapters.add("default", spec_of(config), blank=not fresh)  # a checkpoint will fill it
    check_trains(config, adapters, adapter.method, prepared.train)
    plan = plan_of(config, prepared.train.lengths)
    adapter.method.check_steps(len(plan))
    decided = written | decide(config, adapter.method, len(plan))
    if adapter.ready or not fresh:
        tell_method(tell, with_values(config, decided), adapters)
    with doing("planning the memory of a step", shown=progress):
        recompute = choose_recompute(with_values(config, decided), loaded, prepared.train, plan, fit)
        layers = put_in_place(recompute, config, loaded, adapters)
    decided |= decided_by(recompute, config)
    if fresh and not adapter.ready:
        decided |= see_first(with_values(config, decided), loaded, adapters, prepared.train, plan, progress)
        tell_method(tell, with_values(config, decided), adapters)  # which has chosen ranks and layers by now
    adapters.adapters["default"].ready = True
    adapters.train()
    fitted = config.train.micro_tokens == "fit"
    config = with_values(config, decided)
    assert config.train.learning_rate != "auto"
    optimizer = make_optimizer(adapters.groups(config.train.learning_rate), config.train)
    graphs, words = choose_graphs(config, loaded, adapters, plan, fitted=fitted)
    execution = in_words(loaded, layers, recompute, words)
    return Workshop(config, loaded, adapters, prepared, optimizer, plan, decided, execution, graphs)


def load_and_read(
    config: RunConfig,
    method: Method,
    base: Base,
    *,
    cache: Path | None,
    offline: bool,
    progress: bool,
    tell: Tell,
) -> tuple[Loaded, Prepared]:
    """The model, and the data read beside it: the files of the one and the tokenizer of the other keep no one waiting.

    raises  UserError, DataError: what is wrong with the model, or the data
    """
    room = (reach(read_shape(base.source.path)) or UNLIMITED) - sum(method.inserts())

    def read(pause: Callable[[], None]) -> Prepared:
        prepared = prepare(
            config.data,
            base.tokenizer,
            model_max_length=room,
            seed=config.train.seed,
            cache=cache,
            offline=offline,
            progress=progress,
            each=pause,
        )
        if not prepared.train.targets.any():
            raise DataError("no token of the training set carries loss", hint="look at `loraloom data`")
        tell_data(tell, prepared.report)
        return prepared

    with Beside(read) as reading:
        keep = config.modules_to_save
        loaded = load_model(config.model, base=base, keep=keep, progress=progress, each=reading.check)
        if config.data.packing:
            with doing("trying whether documents in a row stay apart", shown=progress):
                refuse_leaks(loaded)
        return loaded, reading.result()


def in_words(loaded: Loaded, layers: Sequence[str], recompute: Choice, graphs: str) -> dict[str, str]:
    """What computes a step of this run, each with the reason."""
    whole = why_whole_logits(loaded.model)
    return {
        "kernels": ": ".join(path_of(loaded.device)),
        "attention": loaded.attention,
        "layers": "; ".join(layers) or "the model's own code",
        "loss": "in chunks of tokens" if whole is None else f"of whole logits: {whole}",
        "recompute": f"{recompute.tier}: {recompute.reason}",
        "graphs": graphs,
    }


def plan_of(config: RunConfig, lengths: torch.Tensor) -> StepPlan:
    """Which examples each step of a run takes, as its settings say."""
    train = config.train
    return StepPlan(
        lengths,
        epochs=train.epochs,
        max_steps=train.max_steps,
        batch_size=train.batch_size,
        batch_tokens=train.batch_tokens,
        seed=train.seed,
    )


def choose_graphs(
    config: RunConfig, loaded: Loaded, adapters: Adapters, plan: StepPlan, *, fitted: bool
) -> tuple[Graphs | None, str]:
    """CUDA graphs for short passes, where the settings and the run allow it; in words why there are some or none.

    raises  UserError if they are asked for and cannot be
    """
    assert isinstance(config.train.micro_tokens, int)
    tokens = min(config.train.micro_tokens, plan.usual)
    why = graph_reason(adapters, config, loaded.model, loaded.device, fitted=fitted)
    graphs, words = make_graphs(config.train.graphs, why, loaded.device, pad_id=loaded.pad_id, tokens=tokens)
    return graphs, f"{'on' if graphs else 'off'}: {words}"


def choose_recompute(
    config: RunConfig, loaded: Loaded, examples: Examples, plan: StepPlan, fit: Fit | None
) -> Choice:
    """What is computed again, and the tokens of a pass: as set, or as `fit` says of a GPU.

    raises  UserError for train.micro_tokens=fit without a GPU, or if nothing fits into it
    """
    wish, cuda = config.train, loaded.device.type == "cuda"
    if wish.micro_tokens == "fit" and (fit is None or not cuda):
        raise UserError(
            f"train.micro_tokens=fit needs a GPU to fit into, and this run is on {loaded.device}",
            hint="set a number, or auto",
        )
    if fit is not None and cuda and (wish.micro_tokens == "fit" or wish.recompute == "auto"):
        return fit(config, loaded, examples, plan)
    tokens = usual_tokens(config, loaded.device.type)
    if wish.recompute != "auto":
        return Choice(wish.recompute, tokens, "as set")
    return Choice("none", tokens, f"no GPU's memory is planned for on {loaded.device}")


def put_in_place(choice: Choice, config: RunConfig, loaded: Loaded, adapters: Adapters) -> list[str]:
    """Fuse the layers, compile those that are not fused, then recompute them all; what came of it, in words."""
    words = fuse(adapters, config.train, gpu=loaded.device.type == "cuda")
    if config.train.compile:
        layers = list(decoder_layers(loaded.model) or ())
        words.append(compile_layers(layers, loaded.device))
        adapters.undo["compile"] = partial(uncompile, layers)
    apply(loaded.model, adapters, choice.tier)
    return words


def decided_by(choice: Choice, config: RunConfig) -> dict[str, Any]:
    """The settings that were open and that the choice fills in, by dotted name."""
    decided: dict[str, Any] = {"train.recompute": choice.tier} if config.train.recompute == "auto" else {}
    is_open = not isinstance(config.train.micro_tokens, int)
    return decided | ({"train.micro_tokens": choice.tokens} if is_open else {})


def see_first(
    config: RunConfig,
    loaded: Loaded,
    adapters: Adapters,
    examples: Examples,
    plan: StepPlan,
    progress: bool,
) -> dict[str, Any]:
    """Let the method see what it must before the first step; the settings that this decides, by dotted name."""
    method = adapters.adapters["default"].method
    wanted, _ = method.probes()
    drawn = islice(dict.fromkeys(i for step in plan for i in step), wanted)  # in the order of training
    assert isinstance(config.train.micro_tokens, int)
    batches = pack(
        [examples[i] for i in drawn],
        micro_tokens=config.train.micro_tokens,
        packing=config.data.packing,
        pad_id=loaded.pad_id,
    )
    originals = partial(read_originals, loaded.source.path, dtype=loaded.dtype, progress=progress)
    changes = prepare_method(adapters, batches, originals=originals, progress=progress)
    options = changes.pop("options", {})
    return changes | {f"method.{key}": options[key] for key in options.keys() - config.method.keys()}


def any_ids(config: RunConfig) -> dict[str, Any]:
    """The same as one id each, where there is no tokenizer and only shapes matter."""
    kind = methods.find(config.method.get("name", "lora"))
    return {f"method.{key}": [0] for key in kind.text_options if isinstance(config.method.get(key), str)}


def as_ids(config: RunConfig, kind: type[Method], tokenizer: Any) -> dict[str, Any]:
    """The method's settings that are token ids and were given as text, by dotted name."""
    return {
        f"method.{key}": tokenizer(config.method[key], add_special_tokens=False)["input_ids"]
        for key in kind.text_options
        if isinstance(config.method.get(key), str)
    }


def check_trains(config: RunConfig, adapters: Adapters, method: Method, examples: Examples) -> None:
    """There must be biases where biases are to train; a method that chooses among tokens must find some.

    raises  UserError, DataError: something would learn nothing
    """
    check_biases(config, adapters)
    if not method.per_token:
        return
    looked = min(len(examples), 1000)
    if not any(bool(method.token_mask(torch.tensor([examples[i].ids]), None).any()) for i in range(looked)):
        raise DataError(
            f"none of {looked} training examples holds the invocation: the adapter would work on no token",
            hint="put its text into the prompts, as one piece; a tokenizer may join it with what stands beside it",
        )


def check_biases(config: RunConfig, adapters: Adapters) -> None:
    """
    raises  UserError if biases are to train and there are none
    """
    if config.bias != "none" and not any(name.endswith("bias") for name, _ in adapters.overlaid("default")):
        raise UserError(
            f"bias is {config.bias}, and there is no bias to train in this {type(adapters.model).__name__}",
            hint="--set bias=none",
        )


def spec_of(config: RunConfig) -> AdapterSpec:
    """The adapter that the settings ask for."""
    options = {key: value for key, value in config.method.items() if key != "name"}
    return AdapterSpec(
        method=config.method.get("name", "lora"),
        options=options,
        r=config.r,
        alpha=config.alpha,
        dropout=config.dropout,
        target_modules=config.target_modules,
        layers=config.layers,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        bias=config.bias,
        modules_to_save=config.modules_to_save,
        seed=config.train.seed,
    )


def method_of(shop: Workshop) -> Method:
    return shop.adapters.adapters["default"].method


def method_defaults(config: RunConfig) -> dict[str, Any]:
    """What `auto` means for the method: its rank, alpha and layers, by dotted name."""
    spec = spec_of(config).settled()
    entries = spec.target_modules
    if not isinstance(entries, str) and len(entries) == 1:
        entries = entries[0]
    found: dict[str, Any] = {"target_modules": entries}
    if spec.make().ranked:
        found |= {"r": spec.r, "alpha": spec.alpha}
    return {key: value for key, value in found.items() if getattr(config, key) == "auto" != value}


def usual_tokens(config: RunConfig, device: str) -> int:
    """Tokens of a pass on a kind of device, as set or as they are without a plan of its memory."""
    wish = config.train.micro_tokens
    return wish if isinstance(wish, int) else GPU_TOKENS if device == "cuda" else CPU_TOKENS


def decide(config: RunConfig, method: Method, num_steps: int) -> dict[str, Any]:
    """The values of the settings that are `auto` and need no plan of memory, by dotted name."""
    decided = method_defaults(config)
    if config.train.learning_rate == "auto":
        decided["train.learning_rate"] = method.learning_rate
    if config.eval.every == "auto":
        decided["eval.every"] = max(1, math.ceil(num_steps / 10))
    if config.train.batch_size is None and config.train.batch_tokens is None:
        decided["train.batch_size"] = DEFAULT_BATCH
    return decided


def refuse_leaks(loaded: Loaded) -> None:
    """Packing needs a model that keeps documents in one row apart: tried on the model itself.

    raises  UserError if it does not
    """
    with plain_products(loaded.model):
        why = honours_boundaries(loaded.model, loaded.model.get_input_embeddings().weight.shape[0])
    if why is not None:
        raise UserError(f"packing cannot be used: {why}", hint="--set data.packing=false")
