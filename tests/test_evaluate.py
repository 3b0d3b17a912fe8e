"""Held-out loss, standard errors and the table of base beside tuned, each against its plain definition."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_models import END, PAD, FakeAdapters, byte_tokenizer, causal

from loraloom import heldout
from loraloom.data import IGNORED, Example
from loraloom.errors import DataError, NonFinite, UserError
from loraloom.evaluate import choose_tasks, evaluate_run, references_of, render
from loraloom.generate import generate
from loraloom.heldout import held_out
from loraloom.noise import fisher, ratio_stderr, satterthwaite, share_stderr, share_verdict, student, verdict

TOKENIZER = byte_tokenizer()


def example(prompt: str, answer: str, number: int) -> Example:
    before, after = TOKENIZER.encode(prompt), [*TOKENIZER.encode(answer), END]
    place = (len(before), len(before) + len(after) - 1)
    return Example(before + after, [IGNORED] * len(before) + after, f"held.jsonl:{number}", place)


def some_examples(count: int = 12) -> list[Example]:
    return [example(f"{'Why ' * (1 + i % 4)}{i}? ", "because" * (1 + i % 3), i + 1) for i in range(count)]


def run(model: Any, adapters: FakeAdapters, examples: list[Example], **arguments: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"pad_id": PAD, "stop_ids": [END, *range(20)], "max_new_tokens": 12}
    return evaluate_run(model, TOKENIZER, adapters, examples, **settings | arguments)


def row(result: dict[str, Any], metric: str) -> dict[str, Any]:
    return next(row for row in result["rows"] if row["metric"] == metric)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_held_out_loss_equals_one_example_at_a_time(kind: str, packing: bool) -> None:
    model, examples = causal(kind), some_examples()
    done: list[int] = []
    loss = held_out(model, examples, pad_id=PAD, micro_tokens=90, packing=packing, on_batch=done.append)
    assert sum(done) == len(examples)
    assert len(done) > 1
    for one, (nats, targets) in zip(examples, loss.per_example, strict=True):
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([one.ids])).logits[0].double().log_softmax(-1)
        expected = -sum(float(logp[t - 1, x]) for t, x in enumerate(one.labels) if x != IGNORED)
        assert nats == pytest.approx(expected, rel=1e-5)
        assert targets == one.targets
    assert loss.targets == sum(one.targets for one in examples)
    assert loss.nats == pytest.approx(sum(nats for nats, _ in loss.per_example), rel=1e-12)
    assert loss.perplexity == pytest.approx(math.exp(loss.nats / loss.targets))


def test_held_out_refuses_what_it_cannot_measure() -> None:
    nothing = Example([1, 2, 3], [IGNORED] * 3, "x:1")
    with pytest.raises(DataError, match="no token"):
        held_out(causal(), [nothing], pad_id=PAD, micro_tokens=64, packing=True)
    broken = causal()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NonFinite, match="2 held-out examples") as caught:
        held_out(broken, some_examples(2), pad_id=PAD, micro_tokens=64, packing=True)
    assert caught.value.details == ["held.jsonl:1", "held.jsonl:2"]


def test_neighbours_in_a_line_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's tile may hold several documents, so that one which overflows takes others with it."""
    found = heldout.token_nll

    def spread(model: Any, batch: Any) -> Any:
        nll_L, labels = found(model, batch)
        return (nll_L * torch.nan if rows[1].row in batch.rows else nll_L), labels

    rows = some_examples(3)
    monkeypatch.setattr(heldout, "token_nll", spread)
    with pytest.raises(NonFinite, match="1 held-out examples") as caught:
        held_out(causal(), rows, pad_id=PAD, micro_tokens=512, packing=True)
    assert caught.value.details == [rows[1].row]


def test_ratio_stderr_is_the_spread_over_drawn_sets() -> None:
    """Against the truth: the standard deviation of the ratio over many sets drawn anew."""
    generator = np.random.default_rng(0)

    def draw() -> tuple[list[float], list[int]]:
        counts = generator.integers(1, 40, size=300)
        totals = counts * 1.5 + generator.normal(size=300) * counts * 0.5  # tokens of one example go together
        return totals.tolist(), counts.tolist()

    sets = [draw() for _ in range(300)]
    truth = np.std([sum(totals) / sum(counts) for totals, counts in sets])
    estimates = [ratio_stderr(totals, counts) for totals, counts in sets]
    assert np.mean(estimates) == pytest.approx(truth, rel=0.1)
    per_token = 0.5 / math.sqrt(np.mean([sum(counts) for _, counts in sets]))
    assert (
        np.mean(estimates) > 3 * per_token
    )  # counting tokens as if they were independent would claim too much


def test_ratio_stderr_of_equal_counts_is_that_of_a_mean() -> None:
    totals = [3.0, 5.0, 4.0, 9.0]
    assert ratio_stderr(totals, [1] * 4) == pytest.approx(np.std(totals, ddof=1) / 2)
    assert ratio_stderr([3.0], [1]) is None


def test_share_stderr_is_binomial() -> None:
    assert share_stderr(0.25, 48) == pytest.approx(0.0625)
    assert share_stderr(0.0, 0) is None


@pytest.mark.parametrize(
    ("change", "stderr", "lower", "expected"),
    [
        (-0.2, 0.1, True, "better"),
        (0.2, 0.1, True, "worse"),
        (0.2, 0.1, False, "better"),
        (-0.19, 0.1, True, "within noise"),
        (0.0, 0.0, True, "within noise"),
        (-0.5, None, True, "within noise"),
    ],
)
def test_verdict(change: float, stderr: float | None, lower: bool, expected: str) -> None:
    assert verdict(change, stderr, 1000, lower_is_better=lower) == expected


def test_few_examples_have_wider_noise() -> None:
    """Student's factor for 5 examples is 2.776; without any spread, examples that move alike are tossed coins."""
    assert verdict(2.7, 1.0, 4, lower_is_better=False) == "within noise"
    assert verdict(2.8, 1.0, 4, lower_is_better=False) == "better"
    assert verdict(0.5, 0.0, 4, lower_is_better=False) == "within noise"
    assert verdict(0.5, 0.0, 5, lower_is_better=False) == "better"
    assert verdict(math.nan, 0.1, 4, lower_is_better=False) == "within noise"


@pytest.mark.parametrize(("errors", "counts", "freedom"), [((0.2, 0.2), (5, 5), 8), ((0.2, 0), (5, 9), 4)])
def test_errors_of_two_samples_have_satterthwaites_freedom(
    errors: tuple[float, float], counts: tuple[int, int], freedom: float
) -> None:
    assert satterthwaite(errors, counts) == pytest.approx(freedom)


def test_student_of_many_is_the_normal_law() -> None:
    for freedom in (1e4, 1e8):
        for t in (0.5, 1.96, 60.0):
            assert student(t, freedom) == pytest.approx(math.erfc(t / math.sqrt(2)), abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_fisher_is_scipys(n: int, m: int, data: st.DataObject) -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    assert fisher((a, b), (n, m)) == pytest.approx(stats.fisher_exact([[a, n - a], [b, m - b]])[1], rel=1e-6)


def test_fisher_at_the_size_of_a_benchmark() -> None:
    """The tea test's 0.486; and 14,000 items with shares whose normal test says p = 0.0500."""
    assert fisher((3, 1), (4, 4)) == pytest.approx(0.4857, abs=1e-4)
    assert fisher((7000, 7164), (14000, 14000)) == pytest.approx(0.0513, abs=1e-3)


def test_share_verdict_is_the_exact_sign_test() -> None:
    # p = 2 * 0.5^5 = 0.0625 and 2 * 0.5^6 = 0.031
    assert share_verdict([False] * 5, [True] * 5) == "within noise"
    assert share_verdict([False] * 6, [True] * 6) == "better"
    assert share_verdict([True] * 6 + [False] * 50, [False] * 56) == "worse"
    assert share_verdict([True, False] * 20, [False, True] * 20) == "within noise"


def test_the_table_says_what_was_measured() -> None:
    model = causal()
    adapters = FakeAdapters(model, scale=0.5)
    examples = some_examples()
    result = run(model, adapters, examples, style="plain", num_answers=6, progress=False)
    assert json.loads(json.dumps(result)) == result
    assert result["name"] == "held-out"
    assert result["settings"] | {"device": "cpu"} == {
        "examples": 12,
        "rows": result["settings"]["rows"],
        "targets": sum(one.targets for one in examples),
        "answers": 6,
        "max_new_tokens": 12,
        "decoding": "greedy",
        "prompt": "plain",
        "dtype": "float32",
        "device": "cpu",
        "packing": True,
    }
    tuned = held_out(model, examples, pad_id=PAD, micro_tokens=64, packing=False)
    with adapters.disabled():
        base = held_out(model, examples, pad_id=PAD, micro_tokens=64, packing=False)
    loss, ppl = row(result, "loss"), row(result, "perplexity")
    assert loss["base"]["value"] == pytest.approx(base.mean)
    assert loss["tuned"]["value"] == pytest.approx(tuned.mean)
    assert loss["change"] == pytest.approx(tuned.mean - base.mean)
    assert loss["base"]["stderr"] == pytest.approx(ratio_stderr(*zip(*base.per_example, strict=True)))
    differences = [a - b for (a, _), (b, _) in zip(tuned.per_example, base.per_example, strict=True)]
    counts = [count for _, count in base.per_example]
    assert loss["change_stderr"] == pytest.approx(ratio_stderr(differences, counts))
    assert loss["change_stderr"] < math.hypot(loss["base"]["stderr"], loss["tuned"]["stderr"])
    assert ppl["tuned"]["value"] == pytest.approx(math.exp(tuned.mean))
    assert ppl["base"]["stderr"] == pytest.approx(ppl["base"]["value"] * loss["base"]["stderr"])
    assert [one["metric"] for one in result["rows"]] == ["loss", "perplexity", "exact match", "stopped"]


def test_other_rows_have_another_digest() -> None:
    """As many tokens, as many of them trained; only what they are, or which are trained, differs."""
    model = causal()
    sets = [some_examples(2), some_examples(2), some_examples(2)[::-1]]
    first = sets[0][0]
    sets.append([replace(first, labels=[IGNORED, *first.labels[1:-1], IGNORED]), sets[0][1]])
    found = [run(model, FakeAdapters(model), one, num_answers=0)["settings"]["rows"] for one in sets]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_exact_match_compares_greedy_answers_with_references() -> None:
    """The references are what the tuned model says, so it has all of them and the base almost none."""
    model = causal()
    adapters = FakeAdapters(model, scale=2.0)
    stops = [END, *range(20)]
    prompts = [TOKENIZER.encode(f"Question {i}: ") for i in range(24)]
    answers = generate(model, prompts, stop_ids=stops, pad_id=PAD, max_new_tokens=10)
    examples = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if TOKENIZER.decode(answer.ids).strip():
            ids = [*prompt, *answer.ids, END]
            labels = [IGNORED] * len(prompt) + [*answer.ids, END]
            place = (len(prompt), len(ids) - 1)
            examples.append(Example(ids, labels, f"made.jsonl:{number + 1}", place))
    assert len(examples) >= 10
    result = run(model, adapters, examples, max_new_tokens=10, progress=False)
    match = row(result, "exact match")
    assert match["tuned"] == {"value": 1.0, "stderr": 0.0}
    assert match["base"]["value"] < 0.3
    assert match["verdict"] == "better"
    shown = result["examples"]
    assert len(shown) == min(20, len(examples))
    assert all(one["tuned_ok"] and one["tuned"] == one["reference"] for one in shown)
    assert shown[0]["prompt"].startswith("Question ")
    assert {one["row"] for one in shown} <= {one.row for one in examples}


def test_examples_of_every_outcome_are_shown() -> None:
    model = causal()
    adapters = FakeAdapters(model, scale=2.0)
    stops = [END, *range(20)]
    prompts = [TOKENIZER.encode(f"Question {i}: ") for i in range(60)]
    tuned = generate(model, prompts, stop_ids=stops, pad_id=PAD, max_new_tokens=10)
    examples = []
    for number, prompt in enumerate(prompts):
        answer = tuned[number].ids if number >= 55 else TOKENIZER.encode("no such answer")
        if answer:
            labels = [IGNORED] * len(prompt) + answer
            examples.append(Example(prompt + answer, labels, f"x:{number}"))
    result = run(model, adapters, examples, max_new_tokens=10, progress=False)
    outcomes = {(one["base_ok"], one["tuned_ok"]) for one in result["examples"]}
    assert {(False, True), (False, False)} <= outcomes  # though 55 of 60 have the second one
    assert len(result["examples"]) == 20


def test_texts_have_no_exact_match() -> None:
    """A document is all answer: there is nothing to ask."""
    model = causal()
    ids = TOKENIZER.encode("once upon a time")
    texts = [Example(ids, [IGNORED, *ids[1:]], f"t:{i}", (1, len(ids))) for i in range(3)]
    result = run(model, FakeAdapters(model), texts, progress=False)
    assert [one["metric"] for one in result["rows"]] == ["loss", "perplexity"]
    assert result["examples"] == []
    assert result["settings"]["answers"] == 0
    console = Console(file=io.StringIO(), width=120)
    render(result, console)
    assert "exact match was not measured" in console.file.getvalue()  # type: ignore[attr-defined]


def test_one_example_has_no_noise_to_judge_by() -> None:
    model = causal()
    result = run(model, FakeAdapters(model), some_examples(1), progress=False)
    assert {one["verdict"] for one in result["rows"]} == {"within noise"}
    assert row(result, "loss")["base"]["stderr"] is None
    with pytest.raises(DataError, match="no held-out examples"):
        run(model, FakeAdapters(model), [])


def test_answers_run_a_little_beyond_the_references() -> None:
    model = causal()
    result = run(model, FakeAdapters(model), some_examples(), max_new_tokens=None, progress=False)
    assert result["settings"]["max_new_tokens"] == len("becausebecausebecause") + 8


def test_the_table_reads_well(capfd: pytest.CaptureFixture[str]) -> None:
    model = causal()
    result = run(model, FakeAdapters(model, scale=0.5), some_examples())
    console = Console(file=io.StringIO(), width=120)
    render(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "base" in text.splitlines()[0]
    assert "tuned" in text.splitlines()[0]
    ppl = next(line for line in text.splitlines() if line.startswith("perplexity"))
    assert "%" in ppl
    assert "\N{PLUS-MINUS SIGN}" in ppl
    assert "12 greedy answers of at most 12 tokens" in text
    assert "float32" in text
    assert capfd.readouterr().err == ""  # stderr is no terminal here, so there is no bar


def test_a_prompt_of_several_examples_is_answered_once_with_all_their_references() -> None:
    model, twice = causal(), [example("Why? ", "because", 1), example("Why? ", "for it is so", 2)]
    examples = [*twice, example("How? ", "like this", 3)]
    result = run(model, FakeAdapters(model), examples, metrics=["bleu", "rouge_l"])
    assert result["settings"]["answers"] == 2
    assert set(result["settings"]["metrics"]) == {"sacrebleu", "pycocoevalcap"}
    assert [one["metric"] for one in result["rows"][-2:]] == ["bleu", "rouge_l"]
    (first, _) = choose_tasks(TOKENIZER, examples, 9, None, once=True)
    assert references_of([first]) == [["because", "for it is so"]]
    assert len(choose_tasks(TOKENIZER, examples, 9, None)) == 3
    with pytest.raises(UserError, match="no metric"):
        run(model, FakeAdapters(model), examples, metrics=["blue"])
