"""`loraloom plan`: what a run will take, before any weight is loaded.

Bytes by part at the highest point of a step, whether that fits a GPU and how large a pass would, disk and steps, and
full fine-tuning beside. A byte count here is a prediction by `memory`; nothing is measured and no weight is read.

units   bytes; GB is 1e9 of them, as in the papers
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from . import hub
from .config import RunConfig, read_file, resolve, with_values
from .data import prepare
from .errors import UserError
from .facts import read_header
from .fit import Gpu, choose, largest_pass, tiers
from .memory import Predictor, dtype_of, stored
from .model import load_tokenizer, quantisation, refuse_quantised
from .model_files import find_weights, read_config
from .optim8 import state_bytes
from .recompute import Choice
from .shapes import published
from .skeleton import num_layers, read_shape, text_config
from .small_model import NAMES, cache_folder
from .workload import Measured, Workload, assumed
from .workshop import UNLIMITED, method_defaults, plan_of, usual_tokens

NO_DATA = "none"
PAPER = {"full": 1.2e12, "lora": 350e9, "source": "LoRA paper, arXiv:2106.09685, section 4.2, for GPT-3 175B"}

# Full fine-tuning in mixed precision with Adam, bytes a weight (ZeRO, arXiv:1910.02054, section 3.1).
FULL = {
    "weights, 16 bits": 2,
    "gradients, 16 bits": 2,
    "float32 copy of the weights": 4,
    "Adam's two moments, float32": 8,
}


@dataclass(frozen=True)
class Plan:
    """What a run will take, as it is printed and as --json gives it."""

    model: str
    kind: str
    layers: int
    parameters: int
    parameters_in_files: int | None  # as the headers of the weight files say; None without files
    dtype: str
    quantize: str
    base_bytes: int
    method: str
    r: int
    trainable: int
    adapted: int  # layers with an adapter
    micro_tokens: int
    batch: str
    recompute: str
    reason: str  # why that
    tiers: list[dict[str, Any]]  # what each recomputation would need
    optimizer: str
    parts: dict[str, int]  # at the highest point
    peak: int
    phase: str
    needed: int  # with the libraries, the context and a margin
    gpu: dict[str, Any] | None
    fits: bool | None
    largest: int | None  # tokens of the largest pass that fits
    step_tokens: int | None  # more than these a pass cannot use
    disk: dict[str, int]
    steps: dict[str, int] | None
    full: dict[str, int]
    paper: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def settings_of(file: Path | str | None, settings: dict[str, Any]) -> RunConfig:
    """The settings of a run of which only the model must be named.

    raises  UserError as `resolve` does
    """
    given = read_file(file)[0] if file is not None else {}
    blanks = {key: NO_DATA for key in ("data", "output") if key not in given}
    if not any(key == "model" or key.startswith("model.id") for key in (*given, *settings)):
        raise UserError(
            "which model? none is named", hint="-m MODEL, --shape llama3-8b, or a configuration file"
        )
    return resolve(file, blanks | settings)[0]


def plan(
    config: RunConfig,
    *,
    shape: str | None = None,
    gpu: Gpu | None = None,
    length: int | None = None,
    fit: bool = False,
    offline: bool = False,
    progress: bool = False,
) -> Plan:
    """Predict a run.

    shape   a published shape's name, instead of the model's own config.json
    gpu     what to fit into; None: nothing is said about fitting
    length  tokens of the longest example, where there is no data
    fit     plan for the largest pass that fits

    raises  UserError for settings that do not fit the model; or `fit` where nothing fits
    """
    if config.task == "classification":
        raise UserError(
            "the plan knows causal models alone, and this run is a classifier",
            hint="a classifier's passes are set by train.micro_tokens",
        )
    config = with_values(config, method_defaults(config))
    folder = None if shape else folder_of(config, offline=offline)
    about = published(shape) if shape else read_shape(folder)  # type: ignore[arg-type]
    config = config if folder is None else as_in_files(config, folder)
    predictor = Predictor(config, about, cudnn=gpu is None or gpu.cudnn)
    context = int(getattr(text_config(about), "max_position_embeddings", None) or UNLIMITED)
    work, steps = workload(config, folder, context, length, offline=offline, progress=progress)
    if gpu is None and (fit or config.train.micro_tokens == "fit"):
        raise UserError("there is no GPU here to fit into", hint="name one's memory: --gpu 80GB")
    chosen = open_choice(config) if gpu is None else choose(predictor, work, gpu, fit=fit)
    tokens, predictor = chosen.tokens, predictor.at(chosen.tier)
    found = predictor.predict(work.batches(tokens))
    return Plan(
        **about_model(config, shape or config.model.id, folder, predictor),
        micro_tokens=tokens,
        batch=work.words(tokens),
        parts=found.parts,
        peak=found.allocated,
        phase=found.phase,
        needed=found.needed,
        recompute=chosen.tier,
        reason=chosen.reason,
        tiers=table(predictor, work, tokens, gpu),
        gpu=None if gpu is None else asdict(gpu),
        fits=None if gpu is None else found.needed <= gpu.bytes,
        largest=None if gpu is None else largest_pass(predictor, work, gpu.bytes),
        step_tokens=work.step_tokens,
        disk=disk(config, predictor),
        steps=steps,
        paper=PAPER,
    )


def open_choice(config: RunConfig) -> Choice:
    """What is planned for where there is no GPU to fit into."""
    train = config.train
    tokens = usual_tokens(config, "cuda")
    if train.recompute != "auto":
        return Choice(train.recompute, tokens, "as set")
    return Choice("none", tokens, "no GPU to fit into is named")


def table(predictor: Predictor, work: Workload, tokens: int, gpu: Gpu | None) -> list[dict[str, Any]]:
    """A row for each recomputation: its peak, what a GPU must have free, and whether this one has."""
    rows: list[dict[str, Any]] = []
    for one in tiers(predictor, work, tokens):
        found = one.found
        rows.append(
            {
                "recompute": one.name,
                "peak": found and found.allocated,
                "needed": found and found.needed,
                "fits": None if found is None or gpu is None else found.needed <= gpu.bytes,
                "reason": one.reason,
            }
        )
    return rows


def as_in_files(config: RunConfig, folder: Path) -> RunConfig:
    """The settings with what the model's files say of 4 bits.

    raises  UserError for files that are quantised otherwise, or to another table than the settings ask for
    """
    held = read_config(folder).get("quantization_config")
    if not held:
        return config
    refuse_quantised(folder)
    quantisation(config.model, folder)
    kept = {
        "model.quantize": held.get("bnb_4bit_quant_type", "fp4"),
        "model.double_quant": bool(held.get("bnb_4bit_use_double_quant")),
    }
    return with_values(config, kept)


def about_model(config: RunConfig, name: str, folder: Path | None, predictor: Predictor) -> dict[str, Any]:
    """The fields of a plan that are counts of the model and its adapter."""
    rig, about = predictor.whole, predictor.shape
    parameters = sum(p.numel() for p in rig.model.parameters())
    return {
        "model": name,
        "kind": about.model_type,
        "layers": num_layers(about),
        "parameters": parameters,
        "parameters_in_files": counted_in_files(folder),
        "dtype": str(dtype_of(config)).removeprefix("torch."),
        "quantize": config.model.quantize,
        "base_bytes": stored([*rig.model.parameters(), *rig.model.buffers()]),
        "method": config.method["name"],
        "r": config.r,
        "trainable": sum(p.numel() for p in rig.adapters.parameters()),
        "adapted": len(rig.adapter.sites),
        "optimizer": config.train.optimizer,
        "full": {part: parameters * size for part, size in FULL.items()},
    }


def folder_of(config: RunConfig, *, offline: bool) -> Path:
    """The model's folder; of a Hugging Face id only the small files are fetched, and no weights.

    raises  UserError if there is no such model, or it is not here and cannot be fetched
    """
    m = config.model
    if Path(m.id).expanduser().exists() or m.id.lower() in NAMES:
        return hub.resolve(m.id, revision=m.revision, offline=offline).path
    hub.check_id(m.id)
    found = hub.cached(m.id, m.revision, m.allow_pickle)
    if found is not None and (found / "config.json").is_file():
        return found
    if hub.is_offline(offline):
        raise UserError(
            f"offline, and {m.id} is not in the cache",
            hint="leave out --offline: only its config.json and tokenizer are fetched",
        )
    with hub.explain(m.id, m.revision):
        return Path(snapshot_download(m.id, revision=m.revision, allow_patterns=[*hub.SMALL_FILES]))


def workload(
    config: RunConfig,
    folder: Path | None,
    context: int,
    length: int | None,
    *,
    offline: bool,
    progress: bool,
) -> tuple[Workload, dict[str, int] | None]:
    """The run's batches, and its steps; assumed ones where there is no data, or a length stands for it.

    raises  UserError if there is data and no tokenizer to read it with
    """
    if length is not None or [source.path for source in config.data.train] == [NO_DATA]:
        return assumed(config, context, length), None
    if folder is None:
        raise UserError(
            "a published shape has no tokenizer to read the data with",
            hint="--length TOKENS of the longest example, instead of the data",
        )
    prepared = prepare(
        config.data,
        load_tokenizer(folder),
        model_max_length=context,
        seed=config.train.seed,
        cache=cache_folder() / "data",
        offline=offline,
        progress=progress,
    )
    steps = plan_of(config, prepared.train.lengths)
    report = prepared.report
    counts = {
        "examples": report.train,
        "tokens": report.tokens,
        "targets": report.targets,
        "steps": len(steps),
    }
    return Measured(prepared.train, steps, packing=config.data.packing), counts


def counted_in_files(folder: Path | None) -> int | None:
    """Weights in the safetensors files of a folder by their headers; None where there are none."""
    weights = find_weights(folder) if folder is not None else None
    if folder is None or weights is None or weights.kind != "safetensors":
        return None
    if read_config(folder).get("quantization_config"):
        return None  # two codes share a byte there
    items = [item for path in weights.paths for item in read_header(path).values()]
    return sum(torch.Size(item["shape"]).numel() for item in items)


def disk(config: RunConfig, predictor: Predictor) -> dict[str, int]:
    """Bytes of the adapter in 16 bits and as it is written, of a checkpoint, and of all that a run keeps."""
    own = predictor.whole.adapters.parameters()
    adapter = stored(list(predictor.whole.adapters.named_tensors().values()))
    moments = sum(state_bytes(config.train.optimizer, p.numel()) for p in own)
    checkpoint = 2 * adapter + moments  # the PEFT folder, and the state to resume from
    kept = config.train.keep + 1  # a new one is written whole before an old one goes
    halves = 2 * sum(p.numel() for p in own)
    return {
        "adapter_16": halves,
        "adapter": adapter,
        "checkpoint": checkpoint,
        "run": kept * checkpoint + adapter,
    }
