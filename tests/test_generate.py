"""Answers: batches against single prompts, sampling against its distribution, settings that must not leak in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import CONTEXT, END, PAD, FakeAdapters, causal

from loraloom.errors import UserError
from loraloom.generate import Answer, Sampler, batches, context_length, generate

STOPS = [END, *range(20)]  # many, so that a random model's answers end


def some_prompts(lengths: tuple[int, ...] = (3, 17, 9, 80, 1, 30, 17, 95)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]


def answer_all(model: Any, prompts: list[list[int]], **arguments: Any) -> list[Answer]:
    settings = {"stop_ids": STOPS, "pad_id": PAD, "max_new_tokens": 12} | arguments
    return generate(model, prompts, **settings)


def by_hand(model: Any, prompt: list[int], count: int) -> Answer:
    """The plain definition: the likeliest token of a full forward pass, again and again, without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < min(len(prompt) + count, CONTEXT):
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in STOPS:
                return Answer(ids[len(prompt) :], True)
            ids.append(token)
    return Answer(ids[len(prompt) :], False)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "qwen2"])
def test_a_batch_equals_single_prompts_and_the_definition(
    kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = causal(kind)
    prompts = some_prompts()
    together = answer_all(model, prompts, batch_tokens=2000)
    assert together == [answer_all(model, [prompt])[0] for prompt in prompts]
    assert together == [by_hand(model, prompt, 12) for prompt in prompts]
    assert {answer.stopped for answer in together} == {True, False}
    assert capfd.readouterr().err == ""  # transformers has nothing to warn of


def test_the_head_gets_contiguous_inputs() -> None:
    """A slice with gaps made torch copy the head's weight once for each row."""
    model, seen = causal("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].is_contiguous()))
    answer_all(model, some_prompts((9, 9, 9)))
    assert seen
    assert all(seen)


def test_answers_end_at_the_context() -> None:
    prompts = some_prompts((CONTEXT - 1, CONTEXT - 5, 4))
    answers = answer_all(causal("gpt2"), prompts, stop_ids=[], max_new_tokens=9)
    assert [len(answer.ids) for answer in answers] == [1, 5, 9]
    assert not any(answer.stopped for answer in answers)


def test_sampling_is_repeated_by_the_seed_whatever_the_batches() -> None:
    model, prompts = causal(), some_prompts()
    sampling: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9}
    first = answer_all(model, prompts, **sampling, seed=3, batch_tokens=2000)
    assert first == answer_all(model, prompts, **sampling, seed=3, batch_tokens=1)
    assert first != answer_all(model, prompts, **sampling, seed=4)
    state = torch.get_rng_state()
    answer_all(model, prompts, **sampling)
    assert torch.equal(
        state, torch.get_rng_state()
    )  # training draws the same numbers with and without samples


def test_the_sampler_draws_from_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count = 4000
    sampler = Sampler(range(count), 1, temperature=1.0, top_p=1.0, seed=0)
    drawn = sampler(torch.empty(0), probabilities.log().expand(count, 4)).argmax(-1).bincount(minlength=4)
    assert torch.allclose(drawn / count, probabilities, atol=0.03)
    # The nucleus of 0.7 holds the first token and the one that crosses 0.7.
    sampler = Sampler(range(count), 1, temperature=1.0, top_p=0.7, seed=0)
    drawn = sampler(torch.empty(0), probabilities.log().expand(count, 4)).argmax(-1).bincount(minlength=4)
    assert torch.allclose(drawn / count, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03)
    # Temperature 0.5 squares the probabilities.
    sampler = Sampler(range(count), 1, temperature=0.5, top_p=1.0, seed=0)
    drawn = sampler(torch.empty(0), probabilities.log().expand(count, 4)).argmax(-1).bincount(minlength=4)
    assert torch.allclose(drawn / count, probabilities.square() / probabilities.square().sum(), atol=0.03)


def test_a_tiny_nucleus_and_a_tiny_temperature_are_greedy() -> None:
    model, prompts = causal(), some_prompts((4, 9))
    greedy = answer_all(model, prompts)
    assert answer_all(model, prompts, temperature=1.0, top_p=1e-9) == greedy
    assert answer_all(model, prompts, temperature=1e-6) == greedy


def test_the_models_own_settings_do_not_leak_in(capfd: pytest.CaptureFixture[str]) -> None:
    model, prompts = causal(), some_prompts((3, 17, 9))
    plain = answer_all(model, prompts)
    own = model.generation_config
    own.do_sample, own.temperature, own.top_k, own.top_p = True, 5.0, 2, 0.3
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_new_tokens = 3.0, 1, 12
    own.max_length, own.eos_token_id, own.num_beams, own.suppress_tokens = 5, 7, 2, list(range(30, 250))
    saved = copy.deepcopy(own.to_dict())
    assert answer_all(model, prompts) == plain
    assert model.generation_config is own
    assert own.to_dict() == saved
    assert capfd.readouterr().err == ""


def test_tokens_are_told_as_they_come() -> None:
    model, prompts = causal(), some_prompts((3, 17, 9, 80))
    told: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    answers = answer_all(model, prompts, on_token=lambda prompt, token: told[prompt].append(token))
    assert list(told.values()) == [answer.ids for answer in answers]
    finished: list[int] = []
    answer_all(model, prompts, on_batch=finished.append, batch_tokens=1)
    assert finished == [1, 1, 1, 1]


def test_an_error_in_a_callback_leaves_the_model_as_it_was() -> None:
    model = causal()
    model.train()
    own = model.generation_config

    def fail(_prompt: int, _token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_all(model, some_prompts((3,)), on_token=fail)
    assert model.generation_config is own
    assert model.training


def test_rows_of_one_batch_use_their_own_adapters() -> None:
    model, prompts = causal(), some_prompts((9, 9, 9, 5, 5, 5))
    adapters = FakeAdapters(model, ("a", "b"), scale=2.0)
    names = ["a", None, "b", "b", "a", None]
    mixed = answer_all(model, prompts, adapters=adapters, names=names)
    assert sorted(map(len, adapters.routes)) == [6]
    for prompt, name, answer in zip(prompts, names, mixed, strict=True):
        adapters.use(name)
        assert answer == answer_all(model, [prompt])[0]
    adapters.use(None)
    assert mixed != answer_all(model, prompts)
    # Split batches carry the names of their own rows.
    assert answer_all(model, prompts, adapters=adapters, names=names, batch_tokens=40) == mixed


def test_names_need_adapters() -> None:
    with pytest.raises(ValueError, match="names needs adapters"):
        answer_all(causal(), some_prompts((3,)), names=["a"])


def test_batches_stay_within_the_budget() -> None:
    prompts = some_prompts()
    room = [12 if len(prompt) <= CONTEXT - 12 else CONTEXT - len(prompt) for prompt in prompts]
    groups = list(batches(prompts, room, 120))
    assert sorted(i for group in groups for i in group) == list(range(len(prompts)))
    for group in groups:
        assert len(group) == 1 or len(group) * (max(len(prompts[i]) for i in group) + 12) <= 120
        assert len({room[i] for i in group}) == 1


def test_prompts_that_cannot_be_answered_are_named() -> None:
    with pytest.raises(
        UserError, match="2 of 3 prompts cannot be answered; the model takes 96 tokens"
    ) as caught:
        answer_all(causal(), [[1] * CONTEXT, [1], []])
    assert caught.value.details == ["prompt 3 is empty", f"prompt 1 has {CONTEXT} tokens"]
    with pytest.raises(UserError, match="at least one token"):
        answer_all(causal(), [[1]], max_new_tokens=0)
    assert answer_all(causal(), []) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_the_context_is_read_from_the_config(kind: str) -> None:
    assert context_length(causal(kind)) == CONTEXT
