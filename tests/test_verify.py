"""Merge verification: its figures against their definitions, and the experiment behind its limits."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import VOCABULARY, FakeAdapters, causal
from torch import Tensor, nn

from loraloom.errors import Failure, UserError
from loraloom.verify import LIMITS, Verification, compare_models, render

PROMPTS = [[5, 6, 7, 8], [9, 1], [200, 100, 50, 25, 12, 6, 3]]


def long_prompts(count: int = 8, length: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(256, (length,), generator=generator).tolist() for _ in range(count)]


def with_update(
    dtype: torch.dtype, share: float, kept: float = 1.0, scale: float = 2.0
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(base, adapter, merged): a rank-8 update of `share` of each weight's norm, merged at `kept` of its size."""
    base = causal("llama", scale=scale).to(dtype)
    adapter, merged = copy.deepcopy(base), copy.deepcopy(base)
    torch.manual_seed(5)
    for name, module in adapter.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            a, b = torch.randn(8, module.in_features), torch.randn(module.out_features, 8)
            a *= share * module.weight.float().norm() / (b @ a).norm()

            def forward(x: Tensor, module: Any = module, a: Tensor = a, b: Tensor = b) -> Tensor:
                return nn.functional.linear(x, module.weight) + (x.float() @ a.T @ b.T).to(x.dtype)

            module.forward = forward  # type: ignore[method-assign]
            with torch.no_grad():
                weight = merged.get_submodule(name).weight
                weight.copy_(weight.float() + kept * (b @ a))  # type: ignore[arg-type, operator]
    return base, adapter, merged


def test_the_figures_are_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(300, 12, generator=generator) for _ in range(2)]
    result = compare_models(
        lambda ids: tables[0][ids], lambda ids: tables[1][ids], [list(range(200)), [7, 8], [299]]
    )
    rows = [*range(200), 7, 8, 299]
    p, q = (torch.distributions.Categorical(logits=table[rows].double()) for table in tables)
    kl = torch.distributions.kl_divergence(p, q)
    assert result.tokens == 203
    assert result.prompts == 3
    assert result.mean_kl == pytest.approx(float(kl.mean()), rel=1e-9)
    assert result.max_kl == pytest.approx(float(kl.max()), rel=1e-9)
    same = (tables[0][rows].argmax(-1) == tables[1][rows].argmax(-1)).double().mean()
    assert result.top1_agreement == pytest.approx(float(same))
    assert result.max_logit_difference == pytest.approx(float((tables[0] - tables[1])[rows].abs().max()))
    assert not result.ok


def test_a_model_agrees_with_itself() -> None:
    model = causal()
    result = compare_models(model, copy.deepcopy(model), PROMPTS, base=model)
    assert (result.mean_kl, result.max_kl, result.top1_agreement, result.max_logit_difference) == (0, 0, 1, 0)
    assert result.ok
    assert result.adapter_kl == 0


def test_ties_are_no_disagreement() -> None:
    a, b = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0 + 1e-6, 0.0]])
    assert compare_models(lambda ids: a[ids], lambda ids: b[ids], [[0]]).top1_agreement == 1.0


@pytest.mark.parametrize("share", [0.02, 0.2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_right_merge_is_within_the_limits_of_its_dtype(dtype: str, share: float) -> None:
    base, adapter, merged = with_update(getattr(torch, dtype), share)
    result = compare_models(adapter, merged, long_prompts(), dtype=dtype, base=base)
    assert result.ok, result.problems
    assert result.mean_kl < LIMITS[dtype].mean_kl / 4  # with room to spare


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kept", [0.0, 0.4, -1.0])
def test_a_wrong_merge_is_over_a_limit(dtype: str, kept: float) -> None:
    base, adapter, merged = with_update(getattr(torch, dtype), 0.05, kept)
    result = compare_models(adapter, merged, long_prompts(), dtype=dtype, base=base)
    assert not result.ok


def test_an_adapter_that_rounding_swallows_is_noticed() -> None:
    """The divergence is far below the limit of bfloat16, and yet all of the update is gone."""
    base, adapter, merged = with_update(torch.bfloat16, 2e-4, kept=0.0)
    without = compare_models(adapter, merged, long_prompts(), dtype="bfloat16")
    assert without.mean_kl < LIMITS["bfloat16"].mean_kl / 10
    result = compare_models(adapter, merged, long_prompts(), dtype="bfloat16", base=base)
    assert result.adapter_kl == pytest.approx(result.mean_kl)
    assert any("all that the adapter does" in problem for problem in result.problems)


def test_adapters_are_compared_while_they_are_on() -> None:
    model = causal()
    adapters = FakeAdapters(model, scale=0.5)

    def base_logits(ids: Tensor) -> Tensor:
        with adapters.disabled(), torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    seen: list[int] = []
    result = compare_models(model, base_logits, PROMPTS, on_prompt=seen.append)
    assert not result.ok
    assert seen == [1, 1, 1]


def test_what_cannot_be_compared_is_refused() -> None:
    model = causal()
    with pytest.raises(UserError, match="no prompt"):
        compare_models(model, model, [[]])
    with pytest.raises(UserError, match="int4"):
        compare_models(model, model, PROMPTS, dtype="int4")
    with pytest.raises(Failure, match="different shapes"):
        compare_models(model, lambda ids: torch.zeros(1, ids.shape[1], VOCABULARY + 1), PROMPTS)
    with pytest.raises(
        Failure, match="the second model gives logits that are not finite numbers on prompt 1"
    ):
        compare_models(model, lambda ids: torch.full((1, ids.shape[1], VOCABULARY), torch.nan), PROMPTS)


def test_the_result_is_kept_and_printed() -> None:
    def printed(result: Verification) -> str:
        console = Console(file=io.StringIO(), width=200)
        render(result, console)
        return console.file.getvalue()  # type: ignore[attr-defined]

    base, adapter, merged = with_update(torch.float32, 0.05)
    good = compare_models(adapter, merged, PROMPTS, base=base)
    kept = json.loads(json.dumps(good.to_dict()))
    assert kept["ok"] is True
    assert kept["problems"] == []
    assert kept["prompts"] == 3
    assert "3 prompts" in printed(good)
    assert "ok" in printed(good)
    bad = compare_models(adapter, base, PROMPTS, base=base)
    assert bad.to_dict()["ok"] is False
    assert "over the limit" in printed(bad)
    assert "expected at most" in printed(bad)
    assert "keep the adapter" in printed(bad)
