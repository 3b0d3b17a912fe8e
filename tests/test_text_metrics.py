"""Metrics of text against their definitions, written out here, and against figures that others published."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import nltk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom import text_metrics
from loraloom.errors import DataError, UserError
from loraloom.text_metrics import METRICS, check_metrics, check_references, metric_rows, parsed, words

ANSWERS = ["the cat sat on the mat .", "there is a dog in the garden", "rain"]
REFERENCES = [
    ["the cat is on the mat .", "a cat sat on a mat ."],
    ["there is a dog here in the garden"],
    ["it rains all day", "rain , rain and rain", "rain today"],
]


def score(name: str, answers: Any = ANSWERS, references: Any = REFERENCES) -> float:
    return METRICS[name][0](answers, references)


def ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def test_bleu_is_papinenis() -> None:
    """Clipped n-gram precisions and the brevity penalty to the nearest reference."""
    answers, references = ANSWERS[:2], REFERENCES[:2]
    logs, length, nearest = 0.0, 0, 0
    for n in range(1, 5):
        hits = total = 0
        for answer, refs in zip(answers, references, strict=True):
            found, most = ngrams(answer.split(), n), Counter[tuple[str, ...]]()
            for ref in refs:
                most |= ngrams(ref.split(), n)
            hits, total = hits + (found & most).total(), total + found.total()
        logs += math.log(hits / total) / 4
    for answer, refs in zip(answers, references, strict=True):
        size = len(answer.split())
        length += size
        nearest += min((abs(len(ref.split()) - size), len(ref.split())) for ref in refs)[1]
    expected = 100 * math.exp(logs + min(0.0, 1 - nearest / length))
    assert score("bleu", answers, references) == pytest.approx(expected, rel=1e-9)
    assert score("bleu", [refs[0] for refs in REFERENCES[:2]], references) == pytest.approx(100)


def test_nist_weighs_words_by_their_rarity() -> None:
    """Doddington's definition: what matches counts by its information in the references; short answers lose."""
    answers = ["the cat sat on the mat .", "a dog in the garden sat"]
    references = ["the cat is on the mat .", "there is a dog in the garden"]
    counts = Counter(
        gram for ref in references for n in range(1, 6) for gram in ngrams(ref.split(), n).elements()
    )
    size = sum(len(ref.split()) for ref in references)
    total = 0.0
    for n in range(1, 6):
        gained = made = 0.0
        for answer, ref in zip(answers, references, strict=True):
            own = ngrams(answer.split(), n)
            for gram, count in (own & ngrams(ref.split(), n)).items():
                before = counts[gram[:-1]] if n > 1 else size
                gained += count * math.log2(before / counts[gram])
            made += own.total()
        total += gained / made
    ratio = min(1.0, sum(len(answer.split()) for answer in answers) / size)
    beta = math.log(0.5) / math.log(1.5) ** 2
    expected = total * math.exp(beta * math.log(ratio) ** 2)
    assert score("nist", answers, [[ref] for ref in references]) == pytest.approx(expected)
    assert score("nist", ["yes", "no"], [["yes"], ["no"]]) == pytest.approx(1.0)  # log2(2 / 1) of each
    assert score("nist", ["", ""], [["yes"], ["no"]]) == 0


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    def longest(one: list[str], other: list[str]) -> int:
        row = [0] * (len(other) + 1)
        for token in one:
            new = [0]
            for j, word in enumerate(other):
                new.append(row[j] + 1 if token == word else max(new[j], row[j + 1]))
            row = new
        return row[-1]

    expected = []
    for answer, refs in zip(ANSWERS, REFERENCES, strict=True):
        a = words(answer)
        recall = max(longest(a, words(ref)) / len(words(ref)) for ref in refs)
        precision = max(longest(a, words(ref)) / len(a) for ref in refs)
        expected.append((1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision))
    assert score("rouge_l") == pytest.approx(sum(expected) / 3)


def test_cider_is_a_cosine_of_rarities() -> None:
    """CIDEr-D by its definition: clipped tf-idf vectors of 1 to 4 words, and a penalty for other lengths."""
    df = Counter[tuple[str, ...]]()
    for refs in REFERENCES:
        df.update({gram for ref in refs for n in range(1, 5) for gram in ngrams(words(ref), n)})
    big = math.log(len(REFERENCES))

    def vector(text: str, n: int) -> dict[tuple[str, ...], float]:
        return {g: c * (big - math.log(max(1, df[g]))) for g, c in ngrams(words(text), n).items()}

    total = 0.0
    for answer, refs in zip(ANSWERS, REFERENCES, strict=True):
        for ref in refs:
            apart = (len(words(answer)) - 1) - (len(words(ref)) - 1)  # pycocoevalcap counts pairs of words
            for n in range(1, 5):
                one, other = vector(answer, n), vector(ref, n)
                norms = math.hypot(*one.values()) * math.hypot(*other.values())
                dot = sum(min(one[g], other.get(g, 0.0)) * other.get(g, 0.0) for g in one)
                if norms:
                    total += dot / norms * math.exp(-(apart**2) / 72) / 4 / len(refs)
    assert score("cider") == pytest.approx(10 * total / len(ANSWERS), rel=1e-6)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("select a from T where x=1 ;", "SELECT A FROM t WHERE x = 1", True),
        ("SELECT a, b FROM t", "SELECT b, a FROM t", False),
        ("SELECT a FROM t WHERE n = 'Bob'", "SELECT a FROM t WHERE n = 'bob'", False),
        ('SELECT "A" FROM t', 'SELECT "a" FROM t', False),
        ("SELECT a FROM t -- all", "SELECT a FROM t", True),
        ("SELECT a FROM t; SELECT b FROM t", "SELECT a FROM t", False),
    ],
)
def test_queries_are_compared_as_queries(one: str, other: str, same: bool) -> None:
    assert (parsed(one) is not None and parsed(one) == parsed(other)) == same
    assert score("sql", [one], [[other]]) == same


def test_what_is_no_query_is_wrong_in_an_answer_and_an_error_in_a_reference() -> None:
    assert score("sql", ["I do not know"], [["SELECT 1"]]) == 0
    with pytest.raises(DataError, match="reference 2 is no SQL query"):
        check_references(["sql"], [["SELECT 1"], ["hello there"]])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("ab c.,", min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=5))
def test_a_perfect_answer_scores_no_less_than_any_other(texts: list[str]) -> None:
    references = [[text] for text in texts]
    for name in ("bleu", "rouge_l", "cider", "nist"):
        assert score(name, texts, references) >= score(name, texts[::-1], references) - 1e-9, name


def test_a_change_has_an_error_and_is_judged_by_it() -> None:
    references = [[f"word {i} is number {i % 7} of them all"] for i in range(30)]
    right, wrong = [refs[0] for refs in references], ["something else was said here"] * 30
    for name in ("bleu", "rouge_l", "cider"):
        (row,) = metric_rows([name], wrong, right, references)
        assert (row["metric"], row["verdict"]) == (name, "better")
        assert row["change"] == row["tuned"]["value"] - row["base"]["value"]
        (row,) = metric_rows([name], right, right, references)
        assert (row["change"], row["change_stderr"], row["verdict"]) == (0, 0, "within noise")
    half = [r if i % 2 else w for i, (r, w) in enumerate(zip(right, wrong, strict=True))]
    (row,) = metric_rows(["rouge_l"], half, right, references)
    exact = 0.5 / math.sqrt(30) * (1 - score("rouge_l", wrong, references))
    assert row["base"]["stderr"] == pytest.approx(exact, rel=0.35)


def test_unknown_names_and_missing_files_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no metric 'blue'") as caught:
        check_metrics(["blue"])
    assert "bleu" in str(caught.value.hint)
    assert set(check_metrics(["bleu", "sql"])) == {"sacrebleu", "sqlglot"}
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="WordNet"):
        check_metrics(["meteor"])
    with pytest.raises(DataError, match="no answers to score"):
        check_references(["bleu"], [])
    with pytest.raises(DataError, match="n-grams of 4 words"):
        check_references(["bleu"], [["a b c"], ["d"]])
    with pytest.raises(DataError, match="there is one"):
        check_references(["cider"], [["a b c d"]])
    check_references(list(METRICS), [["SELECT a FROM t"], ["SELECT b FROM t"]])
    monkeypatch.setitem(text_metrics.METRICS, "bleu", (text_metrics.bleu, "", ("no-such-package",)))
    with pytest.raises(UserError, match="needs no-such-package"):
        check_metrics(["bleu"])
