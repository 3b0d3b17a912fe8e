"""litgpt 0.5.13: litgpt.lora.GPT through Fabric with bf16-true, or the bnb.nf4 plugin, as litgpt/finetune/lora.py does.

litgpt's single-GPU recipe has no activation checkpointing; --checkpoint on adds torch's wrapper around each Block
(what its FSDP strategy would do). Its bnb plugin quantises every linear, lm_head too. No packing in its data modules.
"""

from __future__ import annotations

import argparse
from typing import Any

import kit
import loop


class Lit:
    name, site = "litgpt", ("base", "litgpt")

    def build(self, a: argparse.Namespace) -> None:
        import lightning
        import torch
        from lightning.fabric.plugins import BitsandbytesPrecision
        from litgpt.lora import GPT, Block, mark_only_lora_as_trainable
        from litgpt.utils import chunked_cross_entropy

        self.ce = chunked_cross_entropy
        nf4 = a.quant == "nf4"
        fabric = lightning.Fabric(
            devices=1,
            accelerator=a.device,
            precision=None if nf4 else "bf16-true",
            plugins=BitsandbytesPrecision("nf4", torch.bfloat16) if nf4 else None,
        )
        torch.manual_seed(0)
        with fabric.init_module(empty_init=False):
            m = GPT(self.config(a))
        for module in m.modules():  # LoRA's A is left unset by design until reset_parameters
            if hasattr(module, "reset_parameters") and hasattr(module, "lora_A"):
                module.reset_parameters()
        mark_only_lora_as_trainable(m)
        if a.checkpoint != "off":
            from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

            checkpoint_wrapper.apply_activation_checkpointing(m, check_fn=lambda x: isinstance(x, Block))
        m = fabric.setup_module(m)
        m.train()
        self.model, self.attn_used = m, "sdpa"
        self.note = "no packing" if any(r.packing == "on" for r in a.runs) else ""

    @staticmethod
    def config(a: argparse.Namespace) -> Any:
        from litgpt.lora import Config

        g, t = a.geom, kit.TARGETS[a.targets]
        return Config(
            name=a.model,
            block_size=max(r.seq for r in a.runs),
            vocab_size=g.vocab,
            padded_vocab_size=g.vocab,
            n_layer=g.layers,
            n_head=g.heads,
            n_query_groups=g.kv,
            n_embd=g.hidden,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=1e-5,
            mlp_class_name="LLaMAMLP",
            intermediate_size=g.inter,
            rope_base=int(g.theta),
            lora_r=a.rank,
            lora_alpha=2 * a.rank,
            lora_dropout=0.0,
            lora_query="q_proj" in t,
            lora_key="k_proj" in t,
            lora_value="v_proj" in t,
            lora_projection="o_proj" in t,
            lora_mlp="gate_proj" in t,
            lora_head=False,
        )

    def prepare(self, b: dict[str, Any], r: argparse.Namespace) -> dict[str, Any]:
        if b["lens"]:
            raise NotImplementedError("litgpt has no packing in its finetune data modules")
        return b

    def loss(self, b: dict[str, Any]) -> Any:
        logits = self.model(b["ids"], lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        return self.ce(logits, b["labels"][..., 1:])


if __name__ == "__main__":
    loop.main(Lit)
