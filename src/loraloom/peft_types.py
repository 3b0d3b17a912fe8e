"""PEFT's types: how each calls what all methods have, which layers it can sit on, what it cannot be asked for here.

A type is another class of settings in PEFT, with words of its own for the rank, the scale and the dropout. What one
method alone has is said by the method: `peft_config`, `from_peft`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .layers import Conv1DLayer, Conv2dLayer, EmbeddingLayer, Layer

# Settings that change what a LoRA computes, and the values under which they do not.
UNREAD: dict[str, tuple[Any, ...]] = {
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "ensure_weight_tying": (False, None),
}
LINEAR = frozenset({Layer, Conv1DLayer})


@dataclass(frozen=True)
class PeftType:
    """One of PEFT's types.

    r, alpha, dropout  what it calls them; None where it has none
    rank               r where a file does not say
    bias               its word for lora_only; None where it trains no biases
    patterns           which of rank_pattern and alpha_pattern it reads as LoRA does
    kinds              the layers it can sit on
    shared             what comes before the keys of tensors that all layers share
    plain              settings that are always written; None is left out
    special            settings that make it another method, and the values under which they do not
    narrow             those of them that only some kinds of layers heed
    unread             settings that no method here honours, and the values under which they change nothing
    tokens             whether it is about tokens in the text: it names no layers then, and has no rank
    """

    r: str = "r"
    rank: int = 8
    alpha: str | None = "lora_alpha"
    dropout: str | None = "lora_dropout"
    bias: str | None = "lora_only"
    patterns: tuple[str, ...] = ("rank_pattern", "alpha_pattern")
    kinds: frozenset[type[Layer]] = LINEAR
    shared: str = "base_model."
    plain: Mapping[str, Any] = field(default_factory=dict)
    special: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    narrow: Mapping[str, frozenset[type[Layer]]] = field(default_factory=dict)
    unread: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    tokens: bool = False

    def layers(self, config: Mapping[str, Any]) -> frozenset[type[Layer]]:
        """The layers it can sit on with these settings."""
        kinds = self.kinds
        for key, some in self.narrow.items():
            kinds = kinds & some if config.get(key) not in self.special[key] else kinds
        return kinds


TYPES: dict[str, PeftType] = {
    "LORA": PeftType(
        kinds=LINEAR | {EmbeddingLayer, Conv2dLayer},
        plain={"init_lora_weights": True, "use_dora": False, "use_rslora": False},
        special={
            "use_dora": (False, None),
            "use_rslora": (False, None),
            "alora_invocation_tokens": (None,),
        },
        narrow={"alora_invocation_tokens": LINEAR},
        unread=UNREAD,
    ),
    "ADALORA": PeftType(
        r="init_r",
        rank=12,
        patterns=(),
        kinds=LINEAR | {Conv2dLayer},
        plain={"init_lora_weights": True, "total_step": 1},
        unread=UNREAD | {"alora_invocation_tokens": (None,), "use_dora": (False, None)},
    ),
    "VERA": PeftType(
        rank=256,
        alpha=None,
        dropout="vera_dropout",
        bias="vera_only",
        patterns=(),
        plain={"init_weights": True},
    ),
    "RANDLORA": PeftType(
        rank=32,
        alpha="randlora_alpha",
        dropout="randlora_dropout",
        bias="randlora_only",
        patterns=(),
        plain={"init_weights": True},
    ),
    "HIRA": PeftType(
        rank=32,
        alpha=None,
        dropout="hira_dropout",
        bias=None,
        patterns=(),  # PEFT 0.21 has rank_pattern, and makes every layer with r all the same
        kinds=LINEAR | {EmbeddingLayer, Conv2dLayer},
        plain={"init_weights": True},
    ),
    "PROMPT_TUNING": PeftType(
        alpha=None,
        dropout=None,
        bias=None,
        patterns=(),
        kinds=frozenset({EmbeddingLayer}),
        shared="",
        plain={"num_transformer_submodules": 1, "prompt_tuning_init": "RANDOM"},
        unread={"num_transformer_submodules": (1, None), "modules_to_save": (None, [])},
        tokens=True,
    ),
}
# Starts of a LoRA that change the base's weights: it means nothing on the base as published but to a method
# that takes the same start again.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
