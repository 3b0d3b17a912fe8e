"""transformers' models and tokenizers: loaded quietly from a folder, written back whole, and their stop tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from . import files
from .errors import OutOfMemory, UserError
from .model_files import read_json

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the screen; we check and report ourselves."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def from_folder(factory: Any, folder: Path, *, state: dict[str, Any] | None = None, **options: Any) -> Any:
    """`factory.from_pretrained` on a local folder, with transformers' errors in the user's words.

    state  weights to take instead of those in the folder's files
    """
    local: Any = {"local_files_only": True, "trust_remote_code": False}
    try:
        if state is None:
            return factory.from_pretrained(folder, **local, **options)
        return from_state(factory, folder, state, local, options)
    except (torch.OutOfMemoryError, UserError):
        raise
    except MemoryError as error:
        raise OutOfMemory(
            f"the machine's memory is too small for {folder}", hint="use a smaller model"
        ) from error
    except Exception as error:  # whatever a broken folder makes transformers raise, it is the folder's fault
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if "allocate memory" in str(error):
            raise OutOfMemory(f"the machine's memory is too small for {folder}", details=lines[:1]) from error
        remote = "trust_remote_code" in str(error)
        if "scaled_dot_product_attention" in str(error):
            raise UserError(
                f"transformers has no sdpa attention for {folder}", hint="--set model.attention=eager"
            ) from error
        raise UserError(
            f"transformers cannot load {folder}",
            details=lines[:6],
            hint="the model needs code of its own, which is never run; use one that transformers knows"
            if remote
            else "the folder may be incomplete, or need a newer transformers: pip install -U transformers",
        ) from error


def from_state(
    factory: Any, folder: Path, state: dict[str, Any], local: dict[str, Any], options: dict[str, Any]
) -> Any:
    """A model of the folder's config.json with these weights, and transformers' report."""
    config = AutoConfig.from_pretrained(folder, **local)
    del config.quantization_config  # else transformers looks for the library that wrote the files
    options = {key: value for key, value in options.items() if key != "use_safetensors"}
    with torch.device("meta"):
        kind = type(factory.from_config(config))  # the factory itself wants a folder to look into
    model, report = kind.from_pretrained(None, config=config, state_dict=state, **local, **options)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, **local)
    return model, report


def on_disk(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the names and shapes of the model's checkpoints: fused experts come apart, for one.

    tensors  by the model's own names; whole modules, or better whole decoder layers
    """
    return revert_weight_conversion(model, tensors)


def pad_id(tokenizer: Any) -> int:
    """The id to fill rows with: the pad token, else the end token, else 0. Masks never look at it."""
    for identity in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if identity is not None:
            return int(identity)
    return 0


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the model's list, the tokenizer's, the chat template's turn end."""
    generation = getattr(model, "generation_config", None)
    listed = getattr(generation, "eos_token_id", None)
    ids = listed if isinstance(listed, list) else [listed]
    ids = [*ids, tokenizer.eos_token_id, turn_end(tokenizer)]
    return [int(identity) for identity in dict.fromkeys(ids) if identity is not None]


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template writes right after an answer; None if there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    answer = "Jqxz"
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template is a program; one that wants other turns has its say where it is used
        return None
    tail = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return next((int(identity) for identity in tail if identity in special), None)


def valid_generation(generation: GenerationConfig) -> GenerationConfig:
    """A copy that transformers agrees to save.

    Many models come with a temperature and no `do_sample`; transformers 5 refuses to save that. The
    sampling settings have no effect there, so leaving them out changes no output.
    """
    generation = copy.deepcopy(generation)
    if not generation.do_sample:
        for name in SAMPLING:
            if hasattr(generation, name):
                setattr(generation, name, None)
    return generation


def write_generation(generation: GenerationConfig, folder: Path) -> None:
    """Write generation_config.json, whatever transformers thinks of it."""
    generation = valid_generation(generation)
    files.write_text(folder / "generation_config.json", generation.to_json_string(use_diff=True))


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer and its chat template.

    The class is given its old name: transformers 5 reads both, transformers 4 and vLLM only the old one.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        files.write_json(path, settings)
