"""Read a GGUF file: its settings, and its tensors under the names and shapes of transformers.

We map the file ourselves and do not use `from_pretrained(gguf_file=...)`: its result counts as quantised
and cannot be saved, keeps the whole model in memory, and leaves out tensors that it does not know. Here every
tensor of the file must have a place and every weight of the model must be found, or the file is refused.

source  the GGUF specification and llama.cpp's convert_hf_to_gguf.py, whose steps are undone here;
        tests/test_convert.py compares each architecture with transformers' own reader
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UserError

TOKENIZER_ARRAYS = ("tokens", "merges", "scores", "token_type")


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file: `fields` are its settings by key, `tensors` gguf's tensor records by name."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Any]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """The setting `key` of the architecture: `get("block_count")` reads llama.block_count."""
        return self.fields.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        """Like `get`, but a file without the setting is refused."""
        value = self.get(key)
        if value is None:
            raise UserError(
                f"{self.path}: the setting {self.architecture}.{key} is missing; the file is broken"
            )
        return value

    @property
    def kinds(self) -> list[str]:
        """The number formats in the file, such as Q4_1 and F32, the most frequent first."""
        names = [tensor.tensor_type.name for tensor in self.tensors.values()]
        return sorted(set(names), key=names.count, reverse=True)


def open_gguf(path: Path | str) -> GgufFile:
    """Read the settings of a GGUF file; its tensors stay on the disk.

    raises  UserError if the gguf package is missing, or the file is not a whole GGUF file
    """
    path = Path(path)
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"{path}: reading a GGUF file needs the gguf package",
            hint="pip install 'loraloom[gguf]'",
        )
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a whole GGUF file: {error}", hint="download it again; its size may be wrong"
        ) from error
    return GgufFile(path, fields, {tensor.name: tensor for tensor in reader.tensors})


def short(value: float) -> float:
    """A float32 setting as the decimal that was meant: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))


def rope(file: GgufFile) -> dict[str, Any]:
    """The rotary settings, in the form of transformers 5.

    raises  UserError for a scaling that the file does not describe fully
    """
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": short(file.get("rope.freq_base", 10000.0)),
    }
    kind = file.get("rope.scaling.type", "none")
    if kind == "linear":
        parameters |= {"rope_type": "linear", "factor": short(file.need("rope.scaling.factor"))}
    elif kind != "none":
        raise UserError(
            f"{file.path}: rotary scaling {kind!r} is not supported in GGUF files",
            hint="get the model as safetensors instead",
        )
    if "rope_freqs.weight" in file.tensors:
        parameters |= llama3_scaling(file, parameters["rope_theta"])
    return parameters


def llama3_scaling(file: GgufFile, theta: float) -> dict[str, Any]:
    """Llama 3's rotary scaling: the file holds its effect, a divisor per frequency, and not its settings.

    All Llama 3 models share the settings but one, the factor, which is the largest divisor. They are taken
    only if they give the file's own numbers back.
    """
    stored = torch.from_numpy(np.copy(file.tensors["rope_freqs.weight"].data)).double().flatten()
    factor, low, high, context = stored.max().item(), 1.0, 4.0, 8192
    count = 2 * stored.numel()
    wavelength = 2 * torch.pi * theta ** (torch.arange(0, count, 2, dtype=torch.float64) / count)
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(stored, expected, rtol=1e-4):
        raise UserError(
            f"{file.path}: rope_freqs.weight is not the rotary scaling of Llama 3; its settings are unknown",
            hint="get the model as safetensors instead",
        )
    return {
        "rope_type": "llama3",
        "factor": short(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def decoder_config(file: GgufFile) -> dict[str, Any]:
    """What Llama, Qwen2 and Qwen3 have in common."""
    if file.get("expert_count", 0):
        raise UserError(
            f"{file.path}: mixtures of experts are not supported in GGUF files",
            hint="get the model as safetensors instead",
        )
    heads = file.need("attention.head_count")
    if not isinstance(heads, int):
        raise UserError(
            f"{file.path}: layers with different numbers of heads are not supported in GGUF files"
        )
    hidden = file.need("embedding_length")
    return {
        "hidden_size": hidden,
        "intermediate_size": file.need("feed_forward_length"),
        "num_hidden_layers": file.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("attention.head_count_kv", heads),
        "head_dim": file.get("attention.key_length", hidden // heads),
        "max_position_embeddings": file.need("context_length"),
        "rms_norm_eps": short(file.need("attention.layer_norm_rms_epsilon")),
        "rope_parameters": rope(file),
    }


def llama_config(file: GgufFile) -> dict[str, Any]:
    return decoder_config(file) | {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }


def gpt2_config(file: GgufFile) -> dict[str, Any]:
    return {
        "n_embd": file.need("embedding_length"),
        "n_layer": file.need("block_count"),
        "n_head": file.need("attention.head_count"),
        "n_inner": file.need("feed_forward_length"),
        "n_positions": file.need("context_length"),
        "layer_norm_epsilon": short(file.need("attention.layer_norm_epsilon")),
    }


# architecture in the file (and model_type in transformers): the class, and the settings
ARCHITECTURES: dict[str, tuple[str, Callable[[GgufFile], dict[str, Any]]]] = {
    "llama": ("LlamaForCausalLM", llama_config),
    "qwen2": ("Qwen2ForCausalLM", decoder_config),
    "qwen3": ("Qwen3ForCausalLM", decoder_config),
    "gpt2": ("GPT2LMHeadModel", gpt2_config),
}


def model_config(file: GgufFile) -> dict[str, Any]:
    """The contents of config.json for a GGUF file.

    raises  UserError if we do not know the architecture, or a setting is missing
    """
    if file.architecture not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: GGUF files of the architecture {file.architecture!r} are not supported",
            hint=f"supported are {', '.join(ARCHITECTURES)}; get the model as safetensors instead",
        )
    if "token_embd.weight" not in file.tensors:
        raise UserError(
            f"{file.path}: the tensor token_embd.weight is missing; the file is broken or only a part"
        )
    name, settings = ARCHITECTURES[file.architecture]
    token = {key: file.fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos")}
    return {
        "architectures": [name],
        "model_type": file.architecture,
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]),  # gguf lists the fastest axis first
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": token["bos"],
        "eos_token_id": token["eos"],
        "pad_token_id": file.fields.get("tokenizer.ggml.padding_token_id"),
        **settings(file),
    }


def tensors(file: GgufFile, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """The weights in float32, one at a time, by their names in transformers.

    shapes  what the model needs: each name and its shape, tied weights once
    raises  UserError if a tensor of the file has no place, a weight is missing, or a shape is wrong
    """
    import gguf

    names = tensor_names(file, shapes)
    for ours, theirs in names.items():
        record = file.tensors[theirs]
        try:
            array = gguf.dequantize(record.data, record.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"{file.path}: {theirs} cannot be read, its format is {record.tensor_type.name}: {error}"
            ) from error
        weight = torch.from_numpy(np.array(array, dtype=np.float32))
        weight = restore(file, theirs, weight)
        if weight.shape != shapes[ours]:
            raise UserError(
                f"{file.path}: {theirs} has the shape {tuple(weight.shape)}, not {tuple(shapes[ours])}"
            )
        yield ours, weight


def tensor_names(file: GgufFile, shapes: dict[str, torch.Size]) -> dict[str, str]:
    """Our name to the file's name, for every weight."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    table = gguf.get_tensor_name_map(architecture, int(file.need("block_count")))
    names = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) or "" for name in shapes}
    missing = [
        f"{ours} ({theirs or 'no GGUF name'})" for ours, theirs in names.items() if theirs not in file.tensors
    ]
    # rope_freqs has become a setting (`rope`); old files also carry masks, which are no weights
    known = {*names.values(), "rope_freqs.weight"}
    extra = [name for name in file.tensors if name not in known and not name.endswith(".attn_rot_embd")]
    if missing or extra:
        raise UserError(
            f"{file.path}: its tensors are not those of a {file.architecture} model",
            details=[f"missing: {name}" for name in missing[:8]]
            + [f"no place for: {name}" for name in extra[:8]],
        )
    return names


def restore(file: GgufFile, name: str, weight: Tensor) -> Tensor:
    """Undo what llama.cpp's converter did to one weight (out, in)."""
    part = name.split(".")[-2]
    if file.architecture == "llama" and part in ("attn_q", "attn_k"):
        # The rotary pairs (i, i + d/2) of transformers stand side by side in llama.cpp.
        heads = file.need("attention.head_count")
        heads = file.get("attention.head_count_kv", heads) if part == "attn_k" else heads
        halves = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)
    if (
        file.architecture == "gpt2"
        and part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        and weight.dim() == 2
    ):
        return weight.T.contiguous()  # transformers' Conv1D keeps (in, out)
    return weight
