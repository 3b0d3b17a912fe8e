"""The same few prompts answered at every evaluation, so that one can watch what the model learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .data import Turn, render_prompt
from .generate import generate
from .nll import evaluating
from .workshop import Workshop

NUM_SAMPLES = 3  # held-out examples to answer, if no prompts are named


def answer_prompts(shop: Workshop) -> Iterator[dict[str, Any]]:
    """{prompt, answer, reference, stopped} for each prompt, answered greedily by the model as it is now."""
    rows = prompts_of(shop)
    if not rows:
        return
    with evaluating(shop.model):
        answers = generate(
            shop.model,
            [ids for ids, _, _ in rows],
            stop_ids=shop.stop_ids,
            pad_id=shop.pad_id,
            max_new_tokens=shop.config.eval.max_new_tokens,
        )
    for (_, prompt, reference), answer in zip(rows, answers):
        yield {
            "prompt": prompt,
            "answer": shop.tokenizer.decode(answer.ids, skip_special_tokens=True).strip(),
            "reference": reference,
            "stopped": answer.stopped,
        }


def prompts_of(shop: Workshop) -> list[tuple[list[int], str, str | None]]:
    """(ids, text, reference) of the prompts that were named, else of the first held-out examples."""
    if shop.config.eval.prompts:
        return [
            (render_prompt(shop.tokenizer, shop.style, [Turn("user", text)]), text, None)
            for text in shop.config.eval.prompts
        ]
    rows = []
    for i in range(min(NUM_SAMPLES, len(shop.eval))):
        example = shop.eval[i]
        if example.prompt_ids:
            text = shop.tokenizer.decode(example.prompt_ids, skip_special_tokens=True).strip()
            reference = shop.tokenizer.decode(example.answer_ids, skip_special_tokens=True).strip()
            rows.append((list(example.prompt_ids), text, reference))
    return rows
