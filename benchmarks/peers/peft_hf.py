"""transformers + peft (+ bitsandbytes nf4 with double quantisation): the stock LoRA / QLoRA stack."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import kit
import loop


class HF:
    name, site, liger = "peft_hf", ("base",), False

    def build(self, a: argparse.Namespace) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        if self.liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(
                rope=True, swiglu=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=True
            )
        torch.manual_seed(0)
        with torch.device(a.device):
            m = AutoModelForCausalLM.from_config(
                kit.hf_config(a), dtype=torch.bfloat16, attn_implementation=a.attn
            )
        if a.quant == "nf4":
            self.to_nf4(m, a.device)
        config = LoraConfig(
            r=a.rank,
            lora_alpha=2 * a.rank,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            target_modules=kit.TARGETS[a.targets],
        )
        m.requires_grad_(False)
        wide = a.autocast == "on"
        self.model = get_peft_model(m, config, autocast_adapter_dtype=wide).to(a.device)
        if not wide:  # peft leaves adapters on nf4 layers in fp32 otherwise
            for p in self.model.parameters():
                if p.requires_grad:
                    p.data = p.data.to(torch.bfloat16)
        self.model.train()
        self.cast = lambda: torch.autocast(a.device, torch.bfloat16) if wide else contextlib.nullcontext()
        self.set_checkpoint(a.checkpoint)
        if a.compile == "on":
            self.model.base_model.model.compile()
        self.attn_used = a.attn

    @staticmethod
    def to_nf4(m: Any, device: str) -> None:
        """Replace each Linear but lm_head by bitsandbytes' Linear4bit, one at a time: nf4, double, bf16 compute."""
        import bitsandbytes as bnb
        import torch

        for _, module in list(m.named_modules()):
            for key, linear in list(module.named_children()):
                if type(linear) is not torch.nn.Linear or key == "lm_head":
                    continue
                about = {"compress_statistics": True, "quant_type": "nf4"}
                q = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    device="meta",
                    **about,
                )
                own = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, module=q, **about)
                q.weight = own.to(device)
                setattr(module, key, q)
        m.is_loaded_in_4bit = True

    def set_checkpoint(self, mode: str) -> bool:
        if mode != "off":
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        return True

    def loss(self, b: dict[str, Any]) -> Any:
        with self.cast():
            return self.model(
                input_ids=b["ids"],
                labels=b["labels"],
                attention_mask=b["mask"],
                position_ids=b["pos"],
                use_cache=False,
            ).loss


if __name__ == "__main__":
    loop.main(HF)
