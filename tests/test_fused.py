"""Rows of fused projections, checked by what the real forward pass does with them.

q twice and k half leaves q . k, and so every logit, as it was; v twice doubles what the attention hands to its
output projection. Powers of two make both exact but for the rotation's rounding.
"""

from __future__ import annotations

import pytest
import tiny
import torch

from loraloom.fused import blocks, interleaved, rows_by_role
from loraloom.targets import select

OUTPUT = {
    "gpt2": "attn.c_proj",
    "neox": "attention.dense",
    "phi3": "self_attn.o_proj",
    "bloom": "self_attention.dense",
    "bigcode-mqa": "attn.c_proj",
    "bigcode-mha": "attn.c_proj",
    "mpt": "attn.out_proj",
}


@torch.no_grad()
def scale(model, role, factor):
    """Multiply the weight and the bias of one role's rows in every layer."""
    for target in select(model, [role]):
        module = model.get_submodule(target.name)
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        weight[target.rows] *= factor
        if getattr(module, "bias", None) is not None:
            module.bias[target.rows] *= factor


def attention_output(model, kind):
    """What the first layer's attention gives to its output projection."""
    ending = OUTPUT.get(kind, "self_attention.dense")
    name = next(name for name, _ in model.named_modules() if name.endswith(ending))
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(tiny.ids())
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", tiny.FUSED)
def test_scaling_q_against_k_changes_no_logit(kind):
    model = tiny.build(kind)
    before = model(tiny.ids()).logits
    scale(model, "q", 2.0)
    assert not torch.allclose(model(tiny.ids()).logits, before, rtol=1e-3, atol=1e-3)
    scale(model, "k", 0.5)
    torch.testing.assert_close(model(tiny.ids()).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.FUSED)
def test_doubling_v_doubles_the_attention(kind):
    model = tiny.build(kind)
    before = attention_output(model, kind)
    scale(model, "v", 2.0)
    torch.testing.assert_close(attention_output(model, kind), 2 * before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", tiny.FUSED)
def test_the_roles_are_all_rows_once(kind):
    model = tiny.build(kind)
    targets = [t for t in select(model, ["q", "k", "v"]) if layer(t.name) == 0]
    assert [t.role for t in targets] == ["q", "k", "v"]
    rows = torch.cat([t.rows for t in targets])
    width = model.get_submodule(targets[0].name).weight.numel() // tiny.WIDTH
    assert sorted(rows.tolist()) == list(range(width))


def layer(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def test_blocks_and_interleaved_by_hand():
    assert {role: rows.tolist() for role, rows in blocks(2, 1, 1).items()} == {
        "q": [0, 1],
        "k": [2],
        "v": [3],
    }
    by_group = {role: rows.tolist() for role, rows in interleaved(2, 2, 1).items()}
    assert by_group == {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}
    by_head = {role: rows.tolist() for role, rows in interleaved(2, 1, 2).items()}
    assert by_head == {"q": [0, 1, 6, 7], "k": [2, 3, 8, 9], "v": [4, 5, 10, 11]}


def test_a_projection_of_unknown_layout_has_no_roles():
    config = tiny.build("gpt2").config
    assert rows_by_role(config, "c_attn", 2 * tiny.WIDTH) is None  # cross-attention: k and v only
    assert rows_by_role(config, "c_proj", 3 * tiny.WIDTH) is None
    assert rows_by_role(None, "c_attn", 3 * tiny.WIDTH) is None
