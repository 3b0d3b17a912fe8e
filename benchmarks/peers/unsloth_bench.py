"""unsloth: FastLanguageModel on a local folder of random weights (written once to $PEERS_MODELS), its own forward,
fused LoRA kernels and fused cross-entropy, under bf16 autocast as its trainer runs (adapters fp32).

--checkpoint on = unsloth's default "unsloth" (offloads layer inputs to host memory), plain = True, off = False.
--xformers on loads the cu12-built xformers beside torch's cu13 (for its packed attention); off: PyTorch attention.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import kit
import loop

MODELS = Path(os.environ.get("PEERS_MODELS", "/tmp/peers-models"))
MODES: dict[str, Any] = {"on": "unsloth", "plain": True, "off": False}
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", "/tmp/unsloth_compiled_cache")


class Unsloth:
    name, site = "unsloth", ("base", "unsloth")

    def build(self, a: argparse.Namespace) -> None:
        import torch

        if a.xformers == "on":
            for library in (Path(kit.SITE) / "xformers").glob("libcudart.so.12*"):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            kit.use_site("xformers")
        from unsloth import FastLanguageModel

        self.a, self.F = a, FastLanguageModel
        self.seq = max(r.seq * (r.batch if r.packing == "on" else 1) for r in a.runs)
        common = {"max_seq_length": self.seq, "use_gradient_checkpointing": MODES[a.checkpoint]}
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(self.folder(a)),
            dtype=torch.bfloat16,
            load_in_4bit=a.quant == "nf4",
            local_files_only=True,
            **common,
        )
        self.model = FastLanguageModel.get_peft_model(
            model,
            r=a.rank,
            target_modules=kit.TARGETS[a.targets],
            lora_alpha=2 * a.rank,
            lora_dropout=0,
            bias="none",
            random_state=0,
            **common,
        )
        self.set_checkpoint(a.checkpoint)
        self.describe()

    def folder(self, a: argparse.Namespace) -> Path:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from random_folder import byte_tokenizer, write_folder

        return write_folder(MODELS / a.model, kit.hf_config(a), device=a.device, tokenizer=byte_tokenizer)

    def describe(self) -> None:
        """Which attention and which of its fused kernels it says it uses."""
        from unsloth.utils.attention_dispatch import select_attention_backend as backend

        self.attn_used = f"dense {backend(False)}, packed {backend(True)}"
        layer = self.model.base_model.model.model.layers[0]
        ways = {
            "qkv": getattr(layer.self_attn, "apply_qkv", None),
            "o": getattr(layer.self_attn, "apply_o", None),
            "mlp": layer.mlp.forward,
        }
        fused = [key for key, way in ways.items() if "lora" in getattr(way, "__name__", "")]
        self.note = f"fused LoRA kernels: {' '.join(fused) or 'none'}"

    def set_checkpoint(self, mode: str) -> bool:
        import torch
        from unsloth.models._utils import apply_unsloth_gradient_checkpointing

        found = apply_unsloth_gradient_checkpointing(MODES[mode], self.seq, torch.bfloat16)
        self.model._unsloth_gradient_checkpointing = found
        self.F.for_training(self.model, use_gradient_checkpointing=found)
        return True

    def prepare(self, b: dict[str, Any], r: argparse.Namespace) -> dict[str, Any]:
        import torch

        extra = {} if b["mask"] is None else {"attention_mask": b["mask"]}
        if b["lens"]:
            lengths = torch.tensor(b["lens"], dtype=torch.int32)
            extra = {"packed_seq_lengths": lengths, "position_ids": b["pos"]}
        return b | {"extra": extra}

    def loss(self, b: dict[str, Any]) -> Any:
        import torch

        with torch.autocast(self.a.device, torch.bfloat16):
            return self.model(input_ids=b["ids"], labels=b["labels"], **b["extra"]).loss


if __name__ == "__main__":
    loop.main(Unsloth)
