"""The loss per token, against full logits and against documents one by one; and the probe of boundaries."""

from __future__ import annotations

import pytest
import torch
from tiny_models import PAD, VOCABULARY, causal
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from loraloom.data import IGNORED, Example
from loraloom.nll import evaluating, honours_boundaries, nll_sum, token_nll
from loraloom.packing import Batch, pack


def some_examples(lengths: tuple[int, ...] = (5, 21, 9, 14, 30, 2)) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for number, length in enumerate(lengths):
        ids = torch.randint(256, (length,), generator=generator).tolist()
        first = 1 + length // 3
        found.append(Example(ids, [IGNORED] * first + ids[first:], f"rows.jsonl:{number + 1}"))
    return found


def one_by_one(model: nn.Module, examples: list[Example]) -> float:
    """The plain definition: each document alone, all logits, log-softmax, sum."""
    total = 0.0
    with torch.no_grad():
        for example in examples:
            logits = model(input_ids=torch.tensor([example.ids])).logits[0]
            logp = logits.log_softmax(-1)
            total -= sum(
                float(logp[t - 1, label]) for t, label in enumerate(example.labels) if label != IGNORED
            )
    return total


class WithoutKeep(nn.Module):
    """A model that computes every logit and takes neither a cache nor anything else."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "qwen2"])
def test_packed_rows_equal_their_documents_one_by_one(kind: str, attention: str) -> None:
    model = causal(kind, attention=attention).double()
    examples = some_examples()
    expected = one_by_one(model, examples)
    for packing in (True, False):
        for micro_tokens in (64, 40):
            batches = pack(examples, micro_tokens=micro_tokens, packing=packing, pad_id=PAD)
            assert sum(batch.targets for batch in batches) == sum(example.targets for example in examples)
            total = sum(float(nll_sum(model, batch).detach()) for batch in batches)
            # Eager attention of Llama and Qwen2 takes its softmax in float32 whatever the model's dtype.
            assert total == pytest.approx(expected, rel=1e-9 if attention == "sdpa" else 1e-7)


def test_index_points_at_the_labelled_tokens() -> None:
    model = causal()
    (batch,) = pack(some_examples((5, 9)), micro_tokens=18, packing=False, pad_id=PAD)
    with torch.no_grad():
        nll, index = token_nll(model, batch)
        logp = model(input_ids=batch.ids).logits.log_softmax(-1)
    assert nll.dtype == torch.float32
    assert index.tolist() == (batch.labels.flatten() != IGNORED).nonzero().flatten().tolist()
    flat = batch.labels.flatten()
    for value, place in zip(nll.tolist(), index.tolist(), strict=True):
        row, column = divmod(place, batch.ids.shape[1])
        assert value == pytest.approx(-float(logp[row, column - 1, flat[place]]), rel=1e-5)


def test_only_needed_logits_are_computed() -> None:
    model = causal()
    seen = []
    model.lm_head.register_forward_hook(lambda _m, inputs, _y: seen.append(tuple(inputs[0].shape[:2])))
    example = Example(list(range(40)), [IGNORED] * 37 + [37, 38, 39], "one")
    (batch,) = pack([example], micro_tokens=40, packing=False, pad_id=PAD)
    token_nll(model, batch)
    assert seen == [(1, 3)]


def test_gradients_do_not_depend_on_which_logits_are_computed() -> None:
    model = causal("gpt2").double()
    (batch,) = pack(some_examples((7, 9, 12)), micro_tokens=64, packing=True, pad_id=PAD)
    nll_sum(model, batch).backward()
    fewer = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    nll_sum(WithoutKeep(model), batch).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, fewer[name], rtol=1e-9, atol=1e-12)


def test_a_batch_without_labels_has_no_loss() -> None:
    ids = torch.randint(256, (1, 6))
    batch = Batch(ids, torch.full_like(ids, IGNORED), None, torch.zeros_like(ids), 0, ["x"], [(0, 0, 6)])
    nll, index = token_nll(causal(), batch)
    assert nll.shape == index.shape == (0,)
    assert float(nll_sum(causal(), batch).detach()) == 0.0


def test_a_label_on_the_first_token_of_a_row_is_left_out() -> None:
    ids = torch.randint(256, (1, 6))
    batch = Batch(ids, ids.clone(), None, torch.zeros_like(ids), 5, ["x"], [(0, 0, 6)])
    _, index = token_nll(causal(), batch)
    assert index.tolist() == [1, 2, 3, 4, 5]


def test_no_hint_about_padding(capfd: pytest.CaptureFixture[str]) -> None:
    batches = pack(some_examples(), micro_tokens=100, packing=False, pad_id=PAD)
    nll_sum(causal("gpt2"), batches[0])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "qwen2"])
def test_models_that_keep_documents_apart(kind: str, attention: str, dtype: torch.dtype) -> None:
    for scale in (1.0, 6.0):
        model = causal(kind, attention=attention, scale=scale).to(dtype)
        assert honours_boundaries(model, VOCABULARY) is None


class Leaky(nn.Module):
    """A model that takes positions and uses them, but attends to the whole row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        mask = torch.ones_like(input_ids)
        output = self.inner(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
        )
        return output.logits


class Unplaced(nn.Module):
    """A model that keeps documents apart and counts positions through the row all the same."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        if position_ids is not None:
            starts = (position_ids == 0).long().cumsum(-1)
            position_ids = torch.arange(input_ids.shape[1])[None] + 2 * (starts - 1)  # a jump, and no restart
        return self.inner(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_models_that_mix_documents_are_caught(scale: float, dtype: torch.dtype) -> None:
    leaky = Leaky(causal("llama", scale=scale)).to(dtype)
    assert "see the one before" in (honours_boundaries(leaky, VOCABULARY) or "")


def test_positions_that_do_not_restart_are_caught() -> None:
    assert "than alone" in (honours_boundaries(Unplaced(causal("gpt2")), VOCABULARY) or "")
    # Rotary positions are relative: there a jump changes nothing, and nothing is wrong.
    assert honours_boundaries(Unplaced(causal("llama")), VOCABULARY) is None


def test_real_models_that_mix_documents_are_caught() -> None:
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    assert "BloomForCausalLM" in (honours_boundaries(bloom, 64) or "")
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    assert honours_boundaries(mamba, 64) is not None


def test_a_model_without_positions_is_caught() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(64, 64)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.embed(input_ids)

    assert "takes no position_ids" in (honours_boundaries(Plain(), 64) or "")


def test_evaluating_gives_every_module_its_mode_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model.train()
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.is_grad_enabled()
