"""Which output rows of a fused projection are q, k and v.

    three blocks    GPT-2 c_attn, MPT Wqkv                      [q; k; v]
    with GQA        Phi-3 qkv_proj, Falcon-7B, GPT-BigCode      [q: heads; k: groups; v: groups]
    by head         GPT-NeoX, Bloom, Falcon-RW                  for each head [q; k; v]
    by group        Falcon with the new decoder                 for each group [its q heads; k; v]

source  the splitting code of each model in transformers; tests/test_fused.py checks each by the symmetry
        (c q) . (k / c) = q . k and by the attention output's linearity in v
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEAVES = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")


def blocks(q: int, k: int, v: int) -> dict[str, Tensor]:
    """Rows of q, then of k, then of v."""
    return dict(zip("qkv", torch.arange(q + k + v).split([q, k, v])))


def interleaved(groups: int, q_heads: int, head_dim: int) -> dict[str, Tensor]:
    """For each group: the rows of its q heads, of k, of v."""
    rows = torch.arange(groups * (q_heads + 2) * head_dim).view(groups, q_heads + 2, head_dim)
    parts = rows.split([q_heads, 1, 1], dim=1)
    return {role: part.flatten() for role, part in zip("qkv", parts)}


def rows_by_role(config: Any, leaf: str, out_features: int) -> dict[str, Tensor] | None:
    """The rows of q, k and v in a fused projection named `leaf`; None if it is none that we know.

    config  the model's configuration, or None for a model without one
    """
    kind = getattr(config, "model_type", "")
    if leaf not in LEAVES or not kind:
        return None
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_heads", 0)
    hidden = getattr(config, "hidden_size", None) or getattr(config, "d_model", 0)
    if not heads or not hidden:
        return None
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    table: dict[str, Tensor] | None = None
    match kind:
        case "gpt2" | "mpt":
            table = blocks(hidden, hidden, hidden)
        case "gpt_bigcode" if config.multi_query:
            table = blocks(hidden, head_dim, head_dim)
        case "phi3":
            groups = config.num_key_value_heads
            table = blocks(heads * head_dim, groups * head_dim, groups * head_dim)
        case "gpt_neox" | "bloom" | "gpt_bigcode":
            table = interleaved(heads, 1, head_dim)
        case "falcon" if config.new_decoder_architecture:
            table = interleaved(config.num_kv_heads, heads // config.num_kv_heads, head_dim)
        case "falcon" if config.multi_query:
            table = blocks(hidden, head_dim, head_dim)
        case "falcon":
            table = interleaved(heads, 1, head_dim)
    if table is None or sum(len(rows) for rows in table.values()) != out_features:
        return None
    return table
