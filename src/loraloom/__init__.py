"""LoRALoom: fine-tune large language models by low-rank adaptation.

    import loraloom

    adapters = loraloom.attach(model, r=16)                       # any PyTorch model
    run = loraloom.api.train(model="...", data="...", output="runs/first")

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

LAZY = {
    "AdapterSpec": "adapter",
    "Adapters": "adapt",
    "attach": "adapt",
    "load_adapter": "adapter_io",
    "save_adapter": "adapter_io",
    "UserError": "errors",
}
__all__ = [
    "AdapterSpec",
    "Adapters",
    "UserError",
    "__version__",
    "api",
    "attach",
    "load_adapter",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name == "api":
        return importlib.import_module(f"{__name__}.api")
    if name not in LAZY:
        raise AttributeError(f"module 'loraloom' has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{LAZY[name]}"), name)
