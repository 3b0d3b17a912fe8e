"""Models of published shapes with random weights, made weight by weight on the GPU: dense, or at once in 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loraloom.incoming import Incoming
from loraloom.on_load import Arrival
from loraloom.skeleton import meta_model


@torch.no_grad()
def random_model(
    config: Any,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    table: str | None = None,
    double: bool = True,
    seed: int = 0,
) -> Any:
    """A frozen causal model; the same seed gives the same numbers before they are quantised.

    table  nf4, fp4 or e2m1 for the linear layers; None for a dense model
    """
    model = meta_model(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    take = Incoming(device, table=table, double=double)
    head = model.get_output_embeddings()
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf, own in module._parameters.items():
            if own is None:
                continue
            if id(own) not in made:
                value = torch.ones(own.shape, dtype=dtype, device=device)
                if own.dim() > 1:
                    value.normal_(0.0, 0.02, generator=generator)
                arrived = take(Arrival(model, f"{path}.{leaf}", module, value, module is head))
                assert arrived is not None
                made[id(own)] = nn.Parameter(arrived, requires_grad=False)
            module._parameters[leaf] = made[id(own)]
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            fresh = type(module)(module.config).to(device)  # rotary frequencies come from the config alone
            module._buffers.update(fresh._buffers)
    return model.eval()
