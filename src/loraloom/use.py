"""A run, an adapter or a plain model, opened for use: evaluate, chat, merge.

A run folder brings everything with it: the base, the adapter, how prompts are written, the held-out examples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import hub, verify
from .adapt import Adapters
from .adapter_io import load_adapter, trained_on
from .config import DataConfig, ModelConfig, Source
from .conversation import Conversation
from .data import Examples, Style, prepare, render_prompt, resolve_style
from .data import cache as store
from .errors import DataError, UserError, nearest
from .evaluate import evaluate_run
from .files import write_json
from .generate import context_length
from .model import Loaded, load_model, write_model
from .model_files import read_config as read_settings
from .peft_config import CONFIG, read_config
from .rundir import STATE, Run, find_runs
from .workshop import UNLIMITED

STORED = "stored"  # the number format that the base's weights have on the disk
NUM_PROMPTS = 32  # for the verification of a merge
PLAIN_PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "Water boils when",
    "def add(a, b):",
    "Write a short list of healthy food.",
    "What is 12 plus 30?",
    "In the year 1969",
    "The quick brown fox",
)


@dataclass
class Opened:
    """A model ready for use, with its adapter if there is one."""

    target: str
    loaded: Loaded
    adapters: Adapters | None
    style: Style
    run: Run | None = None

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    def examples(self, data: str | None = None) -> Examples:
        """The run's held-out examples, or those of a file, written as the run writes them.

        raises  DataError if there are none
        """
        if data is not None:
            return self.examples_of(data)
        found = store.fetch(self.run.path / "data" / "held-out") if self.run is not None else None
        if found is None or not len(found[1]):
            raise DataError(
                f"{self.target} has no held-out examples", hint="name a file of them: --data FILE"
            )
        return found[1]

    def examples_of(self, data: str) -> Examples:
        given = self.run.config.data if self.run is not None else DataConfig(train=[Source(path=data)])
        config = given.model_copy(
            update={
                "train": [Source(path=data)],
                "eval": 0.0,
                "prompt": self.style.name,
                "system": self.style.system,
            }
            | {"limit": None, "max_length": "auto", "max_lost": 0.999, "duplicates": "keep"}
        )
        limit = context_length(self.model) or UNLIMITED
        return prepare(config, self.tokenizer, model_max_length=limit, progress=False).train


def open_target(
    target: Path | str, *, model: str | None = None, dtype: str | None = None, offline: bool = False
) -> Opened:
    """Open a run folder, an adapter folder, or a model (a folder or an id).

    model  the base, instead of the one that the run or the adapter names
    dtype  the base's number format, instead of the run's; "stored" for the one it has on the disk

    raises  UserError if it is none of them, or its base cannot be found
    """
    path = Path(target)
    if (path / STATE).is_file():
        return open_run(Run.open(path), model=model, dtype=dtype, offline=offline)
    if (path / CONFIG).is_file():
        base = model or read_config(path).get("base_model_name_or_path")
        if not base:
            raise UserError(f"{path} does not name its base model", hint="name it: --model ID_OR_FOLDER")
        loaded = load_base(ModelConfig(id=base, **trained_on(path)), dtype, offline=offline)
        return Opened(str(target), loaded, load_adapter(loaded.model, path), style_of(path, loaded))
    if not path.exists() and str(path.parent) != "." and path.parent.is_dir():
        Run.open(path)  # raises, and says which runs are near
    try:
        loaded = load_base(ModelConfig(id=str(target)), dtype, offline=offline)
    except UserError as error:
        near = nearest(str(target), [str(run.path) for run in find_runs(path.parent, depth=1)], count=1)
        if near and not path.exists():
            error.hint = f"did you mean {near[0]}, a run?"
        raise
    return Opened(str(target), loaded, None, style_of(path, loaded))


def open_run(run: Run, *, model: str | None, dtype: str | None, offline: bool) -> Opened:
    """The base of a run with its best adapter."""
    if not (run.adapter_path / CONFIG).is_file():
        raise UserError(
            f"{run.path} has no adapter yet ({run.state.get('status')})", hint=f"loraloom resume {run.path}"
        )
    config = run.config.model.model_copy(update={"id": model, "revision": None} if model else {})
    loaded = load_base(config, dtype or run.env.get("dtype"), offline=offline)
    adapters = load_adapter(loaded.model, run.adapter_path)
    return Opened(str(run.path), loaded, adapters, style_of(run.adapter_path, loaded), run)


def load_base(config: ModelConfig, dtype: str | None, *, offline: bool) -> Loaded:
    """The base in a number format: one that is named, the one on its disk, or what the settings say."""
    if dtype == STORED:
        source = hub.resolve(
            config.id, revision=config.revision, offline=offline, allow_pickle=config.allow_pickle
        )
        about = read_settings(source.path)
        named = about.get("dtype") or about.get("torch_dtype")
        dtype = named if named in ("float32", "bfloat16", "float16") else None
    return load_model(config.model_copy(update={"dtype": dtype} if dtype else {}), offline=offline)


def style_of(folder: Path, loaded: Loaded) -> Style:
    """How prompts are written: as the adapter was trained, else the tokenizer's chat template, else plain."""
    path = folder / "style.json"
    if path.is_file():
        return Style.from_dict(json.loads(path.read_text(encoding="utf-8")))
    return resolve_style("chat" if loaded.tokenizer.chat_template else "plain", None, loaded.tokenizer, [])


def evaluate(
    target: Path | str,
    *,
    data: str | None = None,
    num_answers: int = 200,
    max_new_tokens: int | None = None,
    model: str | None = None,
    dtype: str | None = None,
    offline: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Held-out loss, perplexity and exact match of the base beside the tuned model, with standard errors.

    The result is also kept in the run's eval/ folder, and shown in its report.
    """
    opened = open_target(target, model=model, dtype=dtype, offline=offline)
    if opened.adapters is None:
        raise UserError(
            f"{target} has no adapter to compare with its base", hint="name a run or an adapter folder"
        )
    examples = opened.examples(data)
    result = evaluate_run(
        opened.model,
        opened.tokenizer,
        opened.adapters,
        examples,
        pad_id=opened.loaded.pad_id,
        stop_ids=opened.loaded.stop_ids,
        style=opened.style.name,
        num_answers=num_answers,
        max_new_tokens=max_new_tokens,
        packing=opened.run.config.data.packing if opened.run else True,
        name=Path(data).stem if data else "held-out",
        progress=progress,
    )
    if opened.run is not None:
        write_json(opened.run.path / "eval" / f"{result['name']}.json", result)
    return result


def converse(opened: Opened, **settings: Any) -> Conversation:
    """A conversation with the tuned model; it can switch to the base and back."""
    return Conversation(
        opened.model,
        opened.tokenizer,
        opened.adapters,
        opened.style,
        render=render_prompt,
        stop_ids=opened.loaded.stop_ids,
        pad_id=opened.loaded.pad_id,
        **settings,
    )


def merge(
    target: Path | str,
    out: Path | str,
    *,
    model: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    offline: bool = False,
    on_prompt: Callable[[int], None] | None = None,
) -> verify.Verification:
    """Fold an adapter into its base, write the whole model, read it back and compare it with the adapter.

    Weights are summed in float32 and rounded once, to the format of the base's files unless `dtype` names
    another. A head or embedding that was tied and is adapted apart is written untied.

    raises  UserError if there is no adapter or `out` is taken; NotMergeable for a method that cannot
    """
    out = Path(out)
    refuse_taken(out, force=force)
    opened = open_target(target, model=model, dtype=dtype or STORED, offline=offline)
    if opened.adapters is None:
        raise UserError(f"{target} has no adapter to merge", hint="name a run or an adapter folder")
    refuse_replacing(out, Path(target), opened.loaded.source.path, Path.cwd())
    opened.adapters.eval()
    prompts = probe_prompts(opened)
    before = Recorded(opened, prompts)
    opened.adapters.merge()
    untie(opened.model)
    write_model(opened.model, opened.tokenizer, out)
    name = str(opened.loaded.dtype).removeprefix("torch.")
    merged = load_model(ModelConfig(id=str(out), dtype=name, device=str(opened.loaded.device)), offline=True)
    result = verify.compare_models(
        before.tuned, merged.model, prompts, dtype=name, base=before.base, on_prompt=on_prompt
    )
    if opened.run is not None:
        write_json(opened.run.path / "merge.json", {"folder": str(out), "dtype": name, **result.to_dict()})
        opened.run.add_check(
            "merge verified",
            result.ok,
            f"{result.prompts} prompts: mean KL {result.mean_kl:.2g}, top-1 agreement {result.top1_agreement:.1%}",
        )
    return result


def refuse_taken(out: Path, *, force: bool) -> None:
    """
    raises  UserError if `out` is a file, or a folder with something in it that may not be replaced
    """
    if out.is_file():
        raise UserError(f"{out} is a file; a model needs a folder", hint="choose another one")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise UserError(f"{out} is there already", hint="choose another folder, or --force to replace it")


def refuse_replacing(out: Path, *needed: Path) -> None:
    """
    raises  UserError if replacing the folder `out` would remove one of these folders
    """
    for folder in needed:
        if out.exists() and folder.resolve().is_relative_to(out.resolve()):
            raise UserError(f"replacing {out} would remove {folder}", hint="choose another folder")


class Recorded:
    """Logits of the base and the tuned model on the prompts, taken before merging changes the weights."""

    def __init__(self, opened: Opened, prompts: Sequence[list[int]]) -> None:
        assert opened.adapters is not None
        self.logits: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for prompt in prompts:
            ids = torch.tensor([prompt], device=opened.loaded.device)
            tuned = verify.logits_of(opened.model, ids).cpu()[None]
            with opened.adapters.disabled():
                base = verify.logits_of(opened.model, ids).cpu()[None]
            self.logits[tuple(prompt)] = [tuned, base]

    def tuned(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits[tuple(ids[0].tolist())][0]

    def base(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits[tuple(ids[0].tolist())][1]


def probe_prompts(opened: Opened) -> list[list[int]]:
    """What a merge is verified on: held-out examples with their answers, else a few plain sentences."""
    try:
        held = opened.examples()
        found = [list(held[i].ids) for i in range(min(NUM_PROMPTS, len(held)))]
    except DataError:
        found = [opened.tokenizer(text)["input_ids"] for text in PLAIN_PROMPTS]
    return [ids for ids in found if ids]


def untie(model: Any) -> None:
    """Write the head and the embedding apart if merging has made them differ."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is table.weight:
        return
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model._tied_weights_keys = None  # transformers writes both then
