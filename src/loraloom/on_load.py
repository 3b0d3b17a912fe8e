"""Every weight of a checkpoint passes through our hands, one at a time, before it enters the model.

transformers reads a checkpoint tensor by tensor, renames and fuses what older or other layouts call otherwise
(experts above all), and offers what results to a quantizer. We are that quantizer: so the model's own names
and shapes are what we see, and neither the machine nor the GPU ever holds the model in its 16-bit form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

NAME = "loraloom"


@dataclass(frozen=True)
class Arrival:
    """One weight on its way into the model.

    name    in the model, such as model.layers.0.mlp.down_proj.weight
    module  the module that will hold it, still empty
    value   on the CPU, in the model's dtype; or a Weight4, from a checkpoint in 4 bits
    kept    whether transformers' rule leaves this module in 16 bits (the head and what is tied to it)
    """

    model: nn.Module
    name: str
    module: nn.Module
    value: Tensor
    kept: bool


Take = Callable[[Arrival], Tensor | None]  # gives what enters the model; None leaves the weight missing
_take: ContextVar[Take] = ContextVar("take")


@contextmanager
def passing(take: Take) -> Iterator[dict[str, Any]]:
    """Inside, `from_pretrained(..., **given)` hands every weight to `take`.

    raises  what `take` raised, which transformers would only log
    """
    raised: list[Exception] = []

    def careful(arrival: Arrival) -> Tensor | None:
        if raised:
            raise raised[0]  # transformers goes on to the next weight
        try:
            return take(arrival)
        except Exception as error:
            raised.append(error)
            raise

    token = _take.set(careful)
    try:
        yield {"quantization_config": OnLoad(quant_method=NAME)}
    except Exception as error:
        raise (raised[0] if raised else error) from None
    finally:
        _take.reset(token)


@register_quantization_config(NAME)
@dataclass
class OnLoad(QuantizationConfigMixin):
    quant_method: Any = NAME


class HandOver(ConversionOps):
    """The step of transformers' loading that calls `take`."""

    def __init__(self, kept: set[str]) -> None:
        self.kept = kept

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *patterns: Any, **about: Any) -> dict[str, Any]:
        model, taken = about["model"], {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            path = name.rpartition(".")[0]
            arrival = Arrival(model, name, model.get_submodule(path), tensor, path in self.kept)
            entering = _take.get()(arrival)
            if entering is not None:
                taken[name] = frozen(entering)
        return taken


def kept_modules(model: Any) -> set[str]:
    """The modules that transformers' rule leaves in 16 bits: the head, what is tied to it, what is last."""
    names = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return {name.removesuffix(".weight").removesuffix(".bias") for name in names}


def frozen(value: Tensor) -> Tensor:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)


@register_quantizer(NAME)
class OnLoadQuantizer(HfQuantizer):
    """transformers' view of us."""

    def __init__(self, quantization_config: OnLoad, **about: Any) -> None:
        super().__init__(quantization_config, **about)
        self.kept: set[str] = set()
        self.dtype: torch.dtype | None = None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Told the model's number format before anything is made."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        self.kept = kept_modules(model)

    def param_needs_quantization(self, model: Any, param_name: str, **about: Any) -> bool:
        path, _, leaf = param_name.rpartition(".")
        own = model.get_submodule(path)._parameters.get(leaf)
        # What the model keeps in a format of its own, such as a router in float32, transformers must read itself:
        # it would cast it to the model's before we see it.
        return own is not None and (self.dtype is None or own.dtype == self.dtype)

    def get_quantize_ops(self) -> HandOver:
        return HandOver(self.kept)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Nothing of us stays on the model: it is saved, moved and asked like any other."""
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.__dict__.pop("quantization_config", None)
            config.__dict__.pop("_is_quantized", None)
        for leaf in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(leaf, None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
