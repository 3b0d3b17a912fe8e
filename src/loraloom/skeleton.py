"""A transformers model without weights: every parameter is a shape on the meta device.

source  the model's own config.json, or a published shape in shapes.py
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from .errors import UserError
from .model import own_attention, settle_attention
from .pretrained import quiet
from .trace import Shapes

CLASSIFIER = AutoModelForSequenceClassification


def read_shape(folder: Path) -> Any:
    """The config of a model folder; only config.json is read. Whether its weights are quantised is left out.

    raises  UserError if transformers does not know it
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken config.json makes transformers raise
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(f"transformers cannot read {folder}/config.json", details=[reason]) from error
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def make_shape(model_type: str, **fields: Any) -> Any:
    """A config of a kind of model that transformers knows."""
    return AutoConfig.for_model(model_type, **fields)


def text_config(config: Any) -> Any:
    """The part of a config that describes the decoder."""
    return config.get_text_config()


def num_layers(config: Any) -> int:
    return int(text_config(config).num_hidden_layers)


def meta_model(
    config: Any,
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
    layers: int | None = None,
    factory: Any = AutoModelForCausalLM,
) -> Any:
    """The causal model of a config on the meta device, frozen and in eval mode, with the first `layers` layers.

    attention  as model.attention; auto is what it would be on a GPU
    factory    of another kind of model, such as CLASSIFIER

    raises  UserError if transformers has no such model for it, or not that attention
    """
    config = copy.deepcopy(config)
    if layers is not None:
        text = text_config(config)
        whole = text.num_hidden_layers
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == whole and "layer" in name:
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
    try:
        with torch.device("meta"), quiet():
            own = own_attention(attention)
            model = factory.from_config(config, dtype=dtype, attn_implementation=own)
    except (ValueError, ImportError) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        kind = "classifier" if factory is CLASSIFIER else "causal model"
        raise UserError(
            f"transformers makes no {kind} of this {config.model_type}", details=[reason]
        ) from error
    model.requires_grad_(False).eval()
    with Shapes():
        settle_attention(model, attention, torch.device("meta"), dtype)
    return model


def decoder_layers(model: nn.Module) -> nn.ModuleList | None:
    """The list of the decoder's layers; None if there is none of that length."""
    count = num_layers(model.config)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return lists[0] if lists else None
