"""The verb `merge`: fold an adapter into its base, write the whole model, and verify it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from . import bnb_format, hub
from .adapt import Adapters
from .errors import DataError, Failure, OutOfMemory, UserError
from .files import write_json
from .merge import DEQUANTIZED, ORIGINAL, Recipe, merge_shards
from .merge_check import MergeResult, too_large, verify_merge, within
from .merge_table import Merged
from .model import DTYPES, Loaded, load_tokenizer, name_of, pick_device, quantisation
from .model_files import read_config, stored_format
from .rundir import Run
from .skeleton import read_shape, text_config
from .use import Found, find_target, held_labelled, held_out, load_found, near_runs

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
FOUR_BITS = ("nf4", "fp4", "e2m1", "int4", "4bit")


def merge(
    target: Path | str,
    out: Path | str,
    *,
    model: str | None = None,
    dtype: str | None = None,
    base: str | None = None,
    no_verify: bool = False,
    force: bool = False,
    offline: bool = False,
    progress: bool = False,
    on_prompt: Callable[[int], None] | None = None,
) -> MergeResult:
    """Fold an adapter into its base, write the whole model, read it back and compare it with the adapter.

    A head or embedding that was tied and is adapted apart is written untied.

    dtype  of the result: float32, bfloat16 or float16; None for the format of the base's files
    base   of a run in 4 bits: "dequantized", the weights that training saw (the default), or "original", the
           checkpoint's own

    raises  UserError if there is no adapter or `out` is taken; NotMergeable for a method that cannot
    """
    out = Path(out)
    check_format(dtype)
    refuse_taken(out, force=force)
    found = find_target(target, model=model)
    recipe = recipe_of(found, dtype, base, offline=offline)
    refuse_replacing(out, Path(target), recipe.folder, recipe.adapter, Path.cwd())
    refuse_inside(out, Path(target))
    merged = merge_shards(recipe, out, progress=progress)
    skipped = "--no-verify" if no_verify else too_large(out, recipe.device)
    result = MergeResult(merged, None, None, skipped)
    if skipped is None:
        result = verified(found, recipe, merged, offline=offline, on_prompt=on_prompt)
    if found.run is not None:
        keep_result(found.run, result)
    return result


def keep_result(run: Run, result: MergeResult) -> None:
    """merge.json, and a line among the run's checks if there was a check."""
    write_json(run.path / "merge.json", result.to_dict())
    seen = result.verification
    if seen is not None:
        told = f"mean KL {seen.mean_kl:.2g}, top-1 agreement {seen.top1_agreement:.1%}"
        run.add_check("merge verified", result.ok, f"{seen.prompts} prompts: {told}")


def check_format(dtype: str | None) -> None:
    """
    raises  UserError for 4 bits, which would lose the update, and for what is no number format
    """
    if dtype in FOUR_BITS:
        raise UserError(
            f"a merged model is not written in {dtype}: its steps are larger than most updates, so they would be lost",
            details=["an update of 2 % of a weight's norm comes out with an error of 108 % of itself"],
            hint="merge in 16 bits, then: loraloom convert OUT DST --quantize nf4; or keep the adapter on its base",
        )
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown number format {dtype!r}", hint=f"it can be {', '.join(DTYPES)}")


def recipe_of(found: Found, dtype: str | None, base: str | None, *, offline: bool) -> Recipe:
    """What is merged, and into what.

    raises  UserError if the target has no adapter, or the base cannot be what is asked for
    """
    given = found.base
    with near_runs(found):
        source = hub.resolve(
            given.id, revision=given.revision, offline=offline, allow_pickle=given.allow_pickle
        )
        about = read_config(source.path)
    if found.adapter is None:
        raise UserError(f"{found.target} has no adapter to merge", hint="name a run or an adapter folder")
    kept_in, in_files = quantisation(given, source.path), bnb_format.is_bnb4(about)
    coded = bool(kept_in) or in_files
    base = base or (DEQUANTIZED if coded else ORIGINAL)
    if base == DEQUANTIZED and not coded:
        raise UserError(f"the base of {found.target} was not in 4 bits", hint="leave --base out")
    if base == ORIGINAL and in_files:
        raise UserError(
            f"{source.path} holds only 4-bit weights, no original ones",
            hint="name the model that they were made from: --model ID_OR_FOLDER",
        )
    stored = DTYPES[stored_format(source.path) or "float32"]
    seen = DTYPES[found.dtype] if found.dtype else stored
    return Recipe(
        folder=source.path,
        adapter=found.adapter,
        base=base,
        kept_in=kept_in,
        seen=seen,
        read=seen if base == DEQUANTIZED else stored,
        dtype=DTYPES[dtype] if dtype else stored,
        device=pick_device(given.device),
        keep=found.keep,
        allow_pickle=given.allow_pickle,
        labels=found.labels,
    )


def verified(
    found: Found, recipe: Recipe, merged: Merged, *, offline: bool, on_prompt: Callable[[int], None] | None
) -> MergeResult:
    """The result with its verification, or the reason why there is none."""
    dense = replace(found, base=found.base.model_copy(update={"quantize": "none"}))

    def tuned() -> tuple[Loaded, Adapters]:
        return on_base(dense, merged.dtype, recipe, offline=offline)

    def trained() -> tuple[Loaded, Adapters]:
        return on_base(found, name_of(recipe.seen), recipe, offline=offline)

    both = recipe.base == ORIGINAL and bool(recipe.kept_in)
    prompts = within(
        probe_prompts(found, recipe.folder),
        text_config(read_shape(recipe.folder)).vocab_size,
        models=2 if both else 1,
    )
    try:
        checks = verify_merge(
            Path(merged.folder),
            trained if recipe.base == DEQUANTIZED else tuned,
            trained if both else None,
            prompts,
            dtype=merged.dtype,
            device=recipe.device,
            task="causal" if found.labels is None else "classify",
            on_prompt=on_prompt,
        )
    except OutOfMemory as error:
        return MergeResult(merged, None, None, error.message)
    except Failure as error:
        if merged.dtype == "float16":
            error.hint = "what this model computes may not fit float16: use --dtype bfloat16 or float32"
        raise
    return MergeResult(merged, *checks, None)


def on_base(found: Found, dtype: str, recipe: Recipe, *, offline: bool) -> tuple[Loaded, Adapters]:
    """The adapter on its base, computing in the result's number format: codes come from the numbers in `dtype`."""
    exact = replace(found, base=found.base.model_copy(update={"fp8": False}))  # as the result multiplies
    loaded, adapters = load_found(exact, dtype, offline=offline)
    assert adapters is not None
    if loaded.model.dtype != recipe.dtype:
        loaded.model.to(recipe.dtype)
    return loaded, adapters


def probe_prompts(found: Found, folder: Path) -> list[list[int]]:
    """What a merge is verified on: held-out examples with their answers, else a few plain sentences."""
    try:
        held = held_out(found.target, found.run) if found.labels is None else held_labelled(found)
        prompts = [list(held[i].ids) for i in range(min(NUM_PROMPTS, len(held)))]
    except DataError:
        tokenizer = load_tokenizer(folder)
        prompts = [tokenizer(text)["input_ids"] for text in PLAIN_PROMPTS]
    return [ids for ids in prompts if ids]


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


def refuse_inside(out: Path, run: Path) -> None:
    """
    raises  UserError if `out` is a part of the run: its adapter, its checkpoints
    """
    if run.is_dir() and out.resolve().is_relative_to(run.resolve()) and out.exists():
        raise UserError(
            f"{out} belongs to {run}, which is to be merged", hint="choose a folder outside of it"
        )
