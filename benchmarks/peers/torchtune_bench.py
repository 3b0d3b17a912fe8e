"""torchtune 0.6.1: lora_llama2 / lora_llama3_1 / lora_llama3_2 as lora_finetune_single_device builds and steps them.

--compile on = the recipe's compile: True (each layer, and the chunked cross-entropy). nf4 = quantize_base: torchao
NF4 on the linears that carry LoRA and, as in torchtune's qlora_* models, on every other linear of the block.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import kit
import loop


class Tune:
    name, site = "torchtune", ("base", "torchtune")

    def build(self, a: argparse.Namespace) -> None:
        import torch
        from torchtune import modules, training
        from torchtune.modules.loss import CEWithChunkedOutputLoss
        from torchtune.modules.peft import get_adapter_params, set_trainable_params
        from torchtune.utils import get_logger

        get_logger().setLevel(logging.WARNING)
        make, fields = self.builder(a)
        torch.manual_seed(0)
        with training.set_default_dtype(torch.bfloat16), torch.device(a.device):
            m = make(**fields)
        torch.nn.init.normal_(m.tok_embeddings.weight, std=0.02)  # nn.Embedding's default is std 1
        set_trainable_params(m, get_adapter_params(m))
        self.lossf = CEWithChunkedOutputLoss()
        if a.compile == "on":
            training.compile_model(m, verbose=False)
            self.lossf = training.compile_loss(self.lossf, verbose=False)
        if a.checkpoint != "off":
            training.set_activation_checkpointing(m, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
        m.set_num_output_chunks(self.lossf.num_output_chunks)
        m.train()
        self.model, self.attn_used = m, "sdpa"

    @staticmethod
    def builder(a: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
        """torchtune's own builder for the shape, and its arguments."""
        g = a.geom
        if g.tied:
            from torchtune.models.llama3_2._component_builders import lora_llama3_2 as make
        elif g.rope_factor:
            from torchtune.models.llama3_1._component_builders import lora_llama3_1 as make
        else:
            from torchtune.models.llama2._component_builders import lora_llama2 as make
        names = [t.replace("o_proj", "output_proj") for t in kit.TARGETS[a.targets] if t[0] in "qkvo"]
        return make, {
            "lora_attn_modules": names,
            "apply_lora_to_mlp": a.targets == "all",
            "vocab_size": g.vocab,
            "num_layers": g.layers,
            "num_heads": g.heads,
            "num_kv_heads": g.kv,
            "embed_dim": g.hidden,
            "intermediate_dim": g.inter,
            "max_seq_len": max(r.seq * (r.batch if r.packing == "on" else 1) for r in a.runs),
            "lora_rank": a.rank,
            "lora_alpha": 2 * a.rank,
            "lora_dropout": 0.0,
            "quantize_base": a.quant == "nf4",
        }

    def prepare(self, b: dict[str, Any], r: argparse.Namespace) -> dict[str, Any]:
        """Labels shifted as the recipe does; packed rows padded to batch * seq with document ids, as its data does."""
        import torch
        import torch.nn.functional as F

        ids, labels, pos, lens = b["ids"], b["labels"], b["pos"], b["lens"]
        if lens:
            pad = r.batch * r.seq - ids.shape[1]
            ids, labels = F.pad(ids, (0, pad)), F.pad(labels, (0, pad), value=-100)
            pos = F.pad(pos, (0, pad))
            b = b | {"slots": ids.numel(), "seq_lens": torch.tensor(lens + [pad] * (pad > 0))}
            self.attn_used = "flex (BlockMask)" if ids.is_cuda else "sdpa (dense mask)"
        labels = torch.hstack((labels[:, 1:], labels.new_full((labels.shape[0], 1), -100)))
        return b | {"ids": ids, "labels": labels, "pos": pos}

    def loss(self, b: dict[str, Any]) -> Any:
        mask = None
        if b["lens"]:
            from torchtune.modules.attention_utils import create_block_causal_mask, packed_block_causal_mask

            made = packed_block_causal_mask if b["ids"].is_cuda else create_block_causal_mask
            mask = made([b["seq_lens"]])
        return self.lossf(self.model(tokens=b["ids"], mask=mask, input_pos=b["pos"]), b["labels"])


if __name__ == "__main__":
    loop.main(Tune)
