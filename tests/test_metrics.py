"""Metrics against their textbook definitions in float64, and their errors against the bootstrap."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loraloom.metrics import CLASS_METRICS, majority, of_classes, of_numbers, ranks
from loraloom.noise import share_stderr, spread

CLASSES = st.integers(2, 4)
NUMBERS = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=25)


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    classes = draw(CLASSES)
    pairs = draw(st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=2, max_size=30))
    return [label for label, _ in pairs], [answer for _, answer in pairs], classes


def f1_of(labels: list[int], given: list[int], one: int) -> float:
    """From precision and recall."""
    hit = sum(a == b == one for a, b in zip(labels, given))
    if not hit:
        return 0.0
    precision, recall = hit / given.count(one), hit / labels.count(one)
    return 2 * precision * recall / (precision + recall)


def matthews_of(labels: list[int], given: list[int], classes: int) -> float:
    """The correlation of the two sets of indicators, summed over classes: cov(x, y) / sqrt(cov(x, x) cov(y, y))."""
    x, y = np.eye(classes)[labels], np.eye(classes)[given]
    x, y = x - x.mean(0), y - y.mean(0)
    below = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / below) if below > 1e-12 else 0.0


@settings(deadline=None)
@given(answers())
def test_class_metrics_are_their_definitions(case: tuple[list[int], list[int], int]) -> None:
    labels, given_, classes = case
    found = {metric: of_classes(metric, labels, given_, classes)[0] for metric in CLASS_METRICS}
    assert found["accuracy"] == pytest.approx(np.mean(np.array(labels) == np.array(given_)), abs=1e-12)
    each = [f1_of(labels, given_, one) for one in range(classes)]
    assert found["f1"] == pytest.approx(each[1] if classes == 2 else sum(each) / classes, abs=1e-12)
    assert found["matthews"] == pytest.approx(matthews_of(labels, given_, classes), abs=1e-9)


def test_matthews_of_two_classes_is_its_old_formula() -> None:
    tp, tn, fp, fn = 30, 50, 7, 13
    labels = [1] * tp + [0] * tn + [0] * fp + [1] * fn
    given_ = [1] * tp + [0] * tn + [1] * fp + [0] * fn
    old = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert of_classes("matthews", labels, given_, 2)[0] == pytest.approx(old, rel=1e-12)
    assert of_classes("f1", labels, given_, 2)[0] == pytest.approx(2 * tp / (2 * tp + fp + fn), rel=1e-12)


def test_metrics_are_those_of_sklearn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for classes in (2, 3, 5):
        labels, given_ = rng.integers(0, classes, (2, 200)).tolist()
        average = "binary" if classes == 2 else "macro"
        assert of_classes("f1", labels, given_, classes)[0] == pytest.approx(
            sklearn.f1_score(labels, given_, average=average)
        )
        assert of_classes("matthews", labels, given_, classes)[0] == pytest.approx(
            sklearn.matthews_corrcoef(labels, given_)
        )


@settings(deadline=None)
@given(NUMBERS)
def test_correlations_are_numpys(pairs: list[tuple[int, int]]) -> None:
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    assume(len(set(x)) > 1)
    assume(len(set(y)) > 1)
    assert of_numbers("pearson", x, y)[0] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    middle = [[sum(b < a for b in side) + (side.count(a) + 1) / 2 for a in side] for side in (x, y)]
    assert ranks(torch.tensor(x)).tolist() == middle[0]
    assert of_numbers("spearman", x, y)[0] == pytest.approx(np.corrcoef(*middle)[0, 1], abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(NUMBERS)
def test_influences_are_of_the_metric_taken_without_each_example(pairs: list[tuple[int, int]]) -> None:
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    n = len(x)
    for metric in ("pearson", "spearman"):
        value, influence = of_numbers(metric, x, y)
        without = [of_numbers(metric, x[:i] + x[i + 1 :], y[:i] + y[i + 1 :])[0] for i in range(n)]
        mean = statistics.fmean(without)
        jackknife = math.sqrt((n - 1) / n * sum((one - mean) ** 2 for one in without))
        assert spread(influence) == pytest.approx(jackknife, abs=1e-8)
        assert -1 - 1e-9 <= value <= 1 + 1e-9


def test_two_numbers_have_a_correlation_and_no_error() -> None:
    value, influence = of_numbers("pearson", [1.0, 2.0], [1.0, 3.0])
    assert value == pytest.approx(1)
    assert spread(influence) is None


def test_constant_answers_have_no_correlation() -> None:
    assert of_numbers("pearson", [1.0, 2.0, 3.0], [4.0, 4.0, 4.0])[0] == 0
    assert of_classes("matthews", [0, 1, 1], [1, 1, 1], 2)[0] == 0


def test_the_error_of_accuracy_is_binomial() -> None:
    labels, given_ = [1] * 100, [1] * 80 + [0] * 20
    value, influence = of_classes("accuracy", labels, given_, 2)
    assert value == 0.8
    exact = share_stderr(0.8, 100)
    assert exact is not None
    assert spread(influence) == pytest.approx(exact * math.sqrt(100 / 99), rel=1e-9)


@pytest.mark.parametrize("metric", ["f1", "matthews", "pearson", "spearman"])
def test_errors_are_those_of_the_bootstrap(metric: str) -> None:
    """1,000 draws of 400 examples; the two estimates agree within a tenth."""
    rng = np.random.default_rng(1)
    if metric in CLASS_METRICS:
        labels = rng.integers(0, 3, 400)
        given_ = np.where(rng.random(400) < 0.7, labels, rng.integers(0, 3, 400))
        value_of = lambda x, y: of_classes(metric, x.tolist(), y.tolist(), 3)  # noqa: E731
    else:
        labels = rng.normal(size=400)
        given_ = labels + rng.normal(size=400)
        value_of = lambda x, y: of_numbers(metric, x.tolist(), y.tolist())  # noqa: E731
    ours = spread(value_of(labels, given_)[1])
    if metric in CLASS_METRICS:
        draw = lambda at: value_of(labels[at], given_[at])[0]  # noqa: E731
    elif metric == "pearson":
        draw = lambda at: np.corrcoef(labels[at], given_[at])[0, 1]  # noqa: E731
    else:
        draw = lambda at: np.corrcoef(*(ranks(torch.tensor(side[at])) for side in (labels, given_)))[0, 1]  # noqa: E731
    drawn = [draw(rng.integers(0, 400, 400)) for _ in range(1000)]
    assert ours == pytest.approx(float(np.std(drawn)), rel=0.1)


def test_the_commonest_class_is_trainings() -> None:
    train, held = torch.tensor([0.0, 1, 1]), torch.tensor([0.0, 0, 1, 0])
    assert majority(train, held) == 0.25
