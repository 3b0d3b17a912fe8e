"""Answers to prompts: transformers' generate, in batches whose rows may use different adapters.

A prompt's answer does not depend on what shares its batch: prompts are padded on the left and masked, and
each samples with its own random numbers. The generation settings that came with a model (sampling, penalties,
lengths) are set aside for the call: only the arguments here count.

shapes  B prompts of a batch, T tokens of the longest one, N new tokens, V vocabulary
source  tests/test_generate.py: batches equal single prompts, on rotary and absolute positions
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .dressing import dress_prompts, holding
from .errors import UserError
from .nll import evaluating


class Adapters(Protocol):
    """What we need of adapt.Adapters."""

    def disabled(self) -> AbstractContextManager[Any]: ...
    def routed(self, rows: Sequence[str | None], /) -> AbstractContextManager[Any]: ...
    def inserts(self, name: str, /) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Answer:
    """ids  the new tokens, without the one that ended them | stopped  False if it was cut for its length"""

    ids: list[int]
    stopped: bool


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_tokens: int = 8192,
    on_token: Callable[[int, int], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
    adapters: Adapters | None = None,
    names: Sequence[str | None] | None = None,
) -> list[Answer]:
    """One answer for each prompt, in order; greedy at temperature 0.

    Answers end at the model's context length. Prompt i samples with numbers from (seed, i) alone.

    batch_tokens  a batch holds at most so many tokens with its answers, and at least one prompt
    on_token      called with (prompt number, token) as tokens of its answer appear
    on_batch      called with the number of prompts that a finished batch held
    names         the adapter of each prompt, None for the base; without names, what is active now

    raises  UserError for an empty prompt or one that leaves no room in the model's context
    """
    if names is not None and (adapters is None or len(names) != len(prompts)):
        raise ValueError("names needs adapters, and one name for each prompt")
    if names is None:
        prompts = dress_prompts(model, prompts)
    elif adapters is not None and any(any(adapters.inserts(name)) for name in names if name is not None):
        raise UserError(
            "an adapter with prefix tokens cannot answer beside others", hint="ask one adapter at a time"
        )
    room = allowances(prompts, max_new_tokens, context_length(model))
    answers: dict[int, Answer] = {}
    with evaluating(model), own_settings(model), contiguous_head(model):
        for members in batches(prompts, room, batch_tokens):
            routed: AbstractContextManager[Any] = nullcontext()
            if names is not None and adapters is not None:
                routed = adapters.routed([names[i] for i in members])
            sampler = None
            if temperature > 0:
                sampler = Sampler(members, room[members[0]], temperature=temperature, top_p=top_p, seed=seed)
            stream = Stream(members, set(stop_ids), on_token) if on_token else None
            with routed, holding(model):
                new_BN = extend(
                    model,
                    [prompts[i] for i in members],
                    num_new=room[members[0]],
                    stop_ids=list(stop_ids),
                    pad_id=pad_id,
                    sampler=sampler,
                    stream=stream,
                )
            answers |= zip(members, (cut(row, stop_ids) for row in new_BN.tolist()), strict=True)
            if on_batch:
                on_batch(len(members))
    return [answers[i] for i in range(len(prompts))]


def extend(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    num_new: int,
    stop_ids: list[int],
    pad_id: int,
    sampler: Sampler | None,
    stream: Stream | None,
) -> Tensor:
    """The tokens (B, N) after each prompt; rows that ended early are filled with padding."""
    longest = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), longest), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    device = next(model.parameters()).device
    settings = type(model.generation_config)(
        max_new_tokens=num_new, do_sample=False, eos_token_id=stop_ids or None, pad_token_id=pad_id
    )
    out = model.generate(
        ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        generation_config=settings,
        logits_processor=[sampler] if sampler else [],
        streamer=stream,
    )
    return out[:, longest:].cpu()


def cut(tokens: list[int], stop_ids: Sequence[int]) -> Answer:
    """The answer in a row of new tokens: what stands before the first stop token."""
    end = next((i for i, token in enumerate(tokens) if token in stop_ids), None)
    return Answer(tokens, False) if end is None else Answer(tokens[:end], True)


class Sampler:
    """A logits processor that leaves one sampled token: generate's argmax then has no choice.

    Each row draws one uniform number a step from its own generator and looks it up in the cumulative
    distribution, so a row's answer does not depend on the rows beside it.
    """

    def __init__(
        self, members: Sequence[int], num_new: int, *, temperature: float, top_p: float, seed: int
    ) -> None:
        self.temperature, self.top_p, self.step = temperature, top_p, 0
        self.uniform_BN = torch.stack([uniforms(seed, member, num_new) for member in members])

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        sorted_BV, order_BV = (scores.float() / self.temperature).softmax(-1).sort(-1, descending=True)
        below_BV = sorted_BV.cumsum(-1) - sorted_BV  # the mass of the likelier tokens
        sorted_BV = sorted_BV.masked_fill(below_BV >= self.top_p, 0.0)
        sorted_BV[:, 0] = sorted_BV[:, 0].clamp_min(torch.finfo(torch.float32).tiny)
        upto_BV = sorted_BV.cumsum(-1)
        goal_B1 = self.uniform_BN[:, self.step, None].to(scores.device) * upto_BV[:, -1:]
        self.step += 1
        last_B1 = (sorted_BV > 0).sum(
            -1, keepdim=True
        ) - 1  # rounding must not reach a token of no probability
        choice_B1 = torch.searchsorted(upto_BV, goal_B1, right=True).minimum(last_B1)
        return torch.full_like(scores, -torch.inf).scatter(-1, order_BV.gather(-1, choice_B1), 0.0)


def uniforms(seed: int, member: int, count: int) -> Tensor:
    """Numbers in [0, 1) that depend on the seed and the prompt's number only."""
    mixed = (seed * 0x9E3779B97F4A7C15 + member * 0xBF58476D1CE4E5B9 + 1) % 2**63
    return torch.rand(count, generator=torch.Generator().manual_seed(mixed))


class Stream:
    """A streamer of transformers that passes on the tokens of answers, and no prompt or padding."""

    def __init__(
        self, members: Sequence[int], stop_ids: set[int], on_token: Callable[[int, int], None]
    ) -> None:
        self.open = dict(enumerate(members))  # row -> prompt number, of rows that have not ended
        self.stop_ids, self.on_token, self.started = stop_ids, on_token, False

    def put(self, tokens: Tensor) -> None:
        if not self.started:
            self.started = True  # the first call brings the prompts
            return
        row_tokens = tokens.flatten().tolist()
        for row, member in list(self.open.items()):
            if row_tokens[row] in self.stop_ids:
                del self.open[row]
            else:
                self.on_token(member, row_tokens[row])

    def end(self) -> None:
        """Nothing is held back, so there is nothing left to pass on."""


@contextmanager
def own_settings(model: Any) -> Iterator[None]:
    """Set aside the model's generation settings: generate fills what a call leaves open from them."""
    saved = model.generation_config
    model.generation_config = type(saved)()
    try:
        yield
    finally:
        model.generation_config = saved


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """Give the output head contiguous inputs.

    The last position of each prompt is a slice with gaps between its rows. torch's linear then copies the
    head's weight once for each row: gigabytes, and most of the time of a batch of short answers.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]) if args else None)
    try:
        yield
    finally:
        hook.remove()


def context_length(model: Any) -> int | None:
    """Tokens that the model's positions reach, prompt and answer together; None if it names no limit."""
    return reach(model.config)


def reach(config: Any) -> int | None:
    """The same of a model's config."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def allowances(prompts: Sequence[list[int]], max_new_tokens: int, context: int | None) -> list[int]:
    """How many tokens each prompt may be given.

    raises  UserError naming the prompts that are empty or fill the context
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: an answer needs at least one token")
    details = [f"prompt {i + 1} is empty" for i, prompt in enumerate(prompts) if not prompt]
    if context is not None:
        details += [
            f"prompt {i + 1} has {len(prompt)} tokens"
            for i, prompt in enumerate(prompts)
            if len(prompt) >= context
        ]
    if details:
        limit = f"; the model takes {context} tokens, prompt and answer together" if context else ""
        raise UserError(
            f"{len(details)} of {len(prompts)} prompts cannot be answered{limit}", details=details[:10]
        )
    return [max_new_tokens if context is None else min(max_new_tokens, context - len(p)) for p in prompts]


def batches(prompts: Sequence[list[int]], room: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Prompt numbers in batches: the longest first, of one allowance, within the token budget."""
    members: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)):
        if members:
            first = members[0]
            full = (len(members) + 1) * (len(prompts[first]) + room[first]) > batch_tokens
            if full or room[i] != room[first]:
                yield members
                members = []
        members.append(i)
    if members:
        yield members
