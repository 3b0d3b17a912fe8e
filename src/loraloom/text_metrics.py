"""Metrics of generated text, each by the library that the field computes it with: answers against their references.

    bleu     sacrebleu, 0 to 100
    nist     nltk, n-grams of up to 5 words
    rouge_l  pycocoevalcap, 0 to 1: F of the longest common subsequence, beta 1.2, the best of an answer's references
    cider    pycocoevalcap, CIDEr-D, 0 to 10: n-grams of up to 4 words, by how rare they are in these references
    meteor   nltk, 0 to 1; needs WordNet's files. Not the Java program METEOR 1.5 of the E2E evaluation
    sql      share of queries equal to their reference as sqlglot reads them: white space, the case of keywords and
             of names without quotes, and a trailing semicolon do not count

Words are those of mteval-v13a, in lower case but for bleu. The E2E evaluation splits them by other programs, so a
score here compares with scores here. Every score has a standard error by the paired bootstrap over examples.

source  tests/test_text_metrics.py: definitions written out; Koehn 2004 (bootstrap)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from random import Random
from statistics import stdev
from typing import Any

from .errors import DataError, UserError, did_you_mean
from .noise import verdict

DRAWS = 100  # of the bootstrap: its error of the error is 7 %
Texts = Sequence[str]
References = Sequence[Sequence[str]]  # of each answer
Score = Callable[[Texts, References], float]


def bleu(answers: Texts, references: References) -> float:
    from sacrebleu.metrics import BLEU

    most = max(map(len, references))
    # sacrebleu passes over None where an answer has fewer references than others
    columns: Any = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return float(BLEU().corpus_score(list(answers), columns).score)


def nist(answers: Texts, references: References) -> float:
    from nltk.translate.nist_score import corpus_nist

    split, made = [list(map(words, refs)) for refs in references], [words(answer) for answer in answers]
    longest = max(map(len, made))  # longer n-grams than that bring nothing, and are no number to nltk
    return float(corpus_nist(split, made, n=min(5, longest))) if longest else 0.0


def rouge_l(answers: Texts, references: References) -> float:
    from pycocoevalcap.rouge.rouge import Rouge

    return float(Rouge().compute_score(*tables(references, answers))[0])


def cider(answers: Texts, references: References) -> float:
    from pycocoevalcap.cider.cider import Cider

    return float(Cider().compute_score(*tables(references, answers))[0])


def meteor(answers: Texts, references: References) -> float:
    from nltk.translate.meteor_score import meteor_score

    scores = [
        meteor_score([words(ref) for ref in refs], words(answer))
        for answer, refs in zip(answers, references, strict=True)
    ]
    return sum(scores) / len(scores)


def sql(answers: Texts, references: References) -> float:
    same = sum(
        parsed(answer) is not None and parsed(answer) in map(parsed, refs)
        for answer, refs in zip(answers, references, strict=True)
    )
    return same / len(answers)


# name: how, its unit, and the packages that it takes
METRICS: dict[str, tuple[Score, str, tuple[str, ...]]] = {
    "bleu": (bleu, "0 to 100", ("sacrebleu",)),
    "nist": (nist, "", ("nltk", "sacrebleu")),
    "rouge_l": (rouge_l, "0 to 1", ("pycocoevalcap", "sacrebleu")),
    "cider": (cider, "0 to 10", ("pycocoevalcap", "sacrebleu")),
    "meteor": (meteor, "0 to 1", ("nltk", "sacrebleu")),
    "sql": (sql, "share", ("sqlglot",)),
}


def metric_rows(
    names: Sequence[str], base: Texts, tuned: Texts, references: References
) -> list[dict[str, Any]]:
    """A row for each metric: both models' score with its error, the change, and what to make of it."""
    return [metric_row(name, base, tuned, references) for name in names]


def metric_row(name: str, base: Texts, tuned: Texts, references: References) -> dict[str, Any]:
    score, unit, _ = METRICS[name]
    before, after = score(base, references), score(tuned, references)
    drawn = []
    random, everyone = Random(0), range(len(references))
    for _ in range(DRAWS if len(references) > 1 else 0):
        chosen = random.choices(everyone, k=len(references))
        refs = [references[i] for i in chosen]
        drawn.append([score([side[i] for i in chosen], refs) for side in (base, tuned)])
    errors = [stdev(column) for column in zip(*drawn)] if drawn else [None, None]
    change_stderr = stdev(after - before for before, after in drawn) if drawn else None
    return {
        "metric": name,
        "unit": unit,
        "items": len(references),
        "lower_is_better": False,
        "base": {"value": before, "stderr": errors[0]},
        "tuned": {"value": after, "stderr": errors[1]},
        "change": after - before,
        "change_stderr": change_stderr,
        "verdict": verdict(after - before, change_stderr, len(references) - 1, lower_is_better=False),
    }


def check_metrics(names: Sequence[str]) -> dict[str, str]:
    """The packages that metrics are computed by, with their versions.

    raises  UserError for a name that is none, or a package that is missing
    """
    found: dict[str, str] = {}
    for name in names:
        if name not in METRICS:
            hint = did_you_mean(name, METRICS) or ", ".join(METRICS)
            raise UserError(f"there is no metric {name!r}", hint=hint)
        for package in METRICS[name][2]:
            try:
                found[package] = version(package)
            except ModuleNotFoundError:
                raise UserError(f"{name} needs {package}", hint="pip install 'loraloom[nlg]'") from None
    if "meteor" in names:
        check_wordnet()
    return found


def check_wordnet() -> None:
    """raises  UserError if nltk has no WordNet on this machine; it is not fetched unasked"""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise UserError(
            "meteor needs WordNet, which nltk does not find",
            hint="python -m nltk.downloader wordnet, or leave meteor out",
        ) from None


def check_references(names: Sequence[str], references: References) -> None:
    """Whether metrics can say anything of these examples, before any is answered.

    raises  DataError if not
    """
    if names and not references:
        raise DataError("no example has a prompt to answer, so there are no answers to score")
    if "bleu" in names and max(len(words(ref)) for refs in references for ref in refs) < 4:
        raise DataError("bleu counts n-grams of 4 words, and no reference has so many", hint="rouge_l")
    if "cider" in names and len(references) < 2:
        raise DataError("cider weighs words by how rare they are among the examples, and there is one")
    for i, refs in enumerate(references if "sql" in names else ()):
        for reference in refs:
            if parsed(reference) is None:
                raise DataError(
                    f"reference {i + 1} is no SQL query that sqlglot reads: {reference[:80]}",
                    hint="sql compares queries; exact match compares other text, WikiSQL's readable form too",
                )


@cache
def parsed(text: str) -> str | None:
    """A query in one way of writing; None if it is none."""
    import sqlglot

    logging.getLogger("sqlglot").setLevel(logging.CRITICAL)  # it warns of answers that are no queries
    from sqlglot.errors import SqlglotError
    from sqlglot.optimizer.normalize_identifiers import normalize_identifiers

    try:
        trees = [tree for tree in sqlglot.parse(text) if tree is not None]
        if len(trees) != 1 or not isinstance(trees[0], sqlglot.exp.Query):
            return None
        return str(normalize_identifiers(trees[0]).sql(identify=True, comments=False))
    except (SqlglotError, RecursionError):
        return None


def tables(references: References, answers: Texts) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and answers by number, as words with a space between, as pycocoevalcap takes them."""
    return (
        {i: [" ".join(words(ref)) for ref in refs] for i, refs in enumerate(references)},
        {i: [" ".join(words(answer))] for i, answer in enumerate(answers)},
    )


def words(text: str) -> list[str]:
    """The words of mteval-v13a, in lower case."""
    return str(tokenizer()(text.lower())).split()


@cache
def tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()
