"""Accuracy, F1, Matthews' and the two correlations, each with its standard error.

Labels are class numbers 0 .. C - 1, or numbers. The error is the jackknife's: the metric is taken again without each
example, and what an example moves it by is its influence, so that two models' errors on the same examples can be taken
together (noise.spread). For accuracy this is the binomial error with n - 1.

  F1        2 TP / (2 TP + FP + FN) of class 1 where there are two classes, else the mean over classes; 0 for a class
            that is neither there nor answered
  Matthews  (c s - p t) / sqrt((s^2 - p p)(s^2 - t t)) with s examples, c right, p and t the counts of answers and
            labels by class; 0 where all answers, or all labels, are one class
  Pearson   of numbers; 0 where one side is constant. Spearman is Pearson's of the ranks, equal ones averaged

shapes  n examples, C classes, table_CC[label, answer]
source  Baldi et al. 2000 and Gorodkin 2004 (Matthews for C classes); Efron and Stein 1981 (jackknife)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 22  # numbers of the ranks that are taken again at once
CLASS_METRICS = ("accuracy", "f1", "matthews")
NUMBER_METRICS = ("pearson", "spearman")


def accuracy(table_CC: Tensor) -> Tensor:
    """table_CC may have further dimensions before it, here and below."""
    return table_CC.diagonal(dim1=-2, dim2=-1).sum(-1) / table_CC.sum((-2, -1))


def f1(table_CC: Tensor) -> Tensor:
    right_C = table_CC.diagonal(dim1=-2, dim2=-1)
    both_C = table_CC.sum(-1) + table_CC.sum(-2)
    score_C = torch.where(both_C > 0, 2 * right_C / both_C.clamp_min(1), 0.0)
    return score_C[..., 1] if table_CC.shape[-1] == 2 else score_C.mean(-1)


def matthews(table_CC: Tensor) -> Tensor:
    told_C, answered_C = table_CC.sum(-1), table_CC.sum(-2)
    count = table_CC.sum((-2, -1))
    right = table_CC.diagonal(dim1=-2, dim2=-1).sum(-1)
    top = right * count - (told_C * answered_C).sum(-1)
    below = (count**2 - (answered_C**2).sum(-1)) * (count**2 - (told_C**2).sum(-1))
    return torch.where(below > 0, top / below.clamp_min(1e-300).sqrt(), 0.0)


def pearson(x_n: Tensor, y_n: Tensor) -> Tensor:
    """Over the last dimension."""
    x_n, y_n = x_n - x_n.mean(-1, keepdim=True), y_n - y_n.mean(-1, keepdim=True)
    below = (x_n**2).sum(-1) * (y_n**2).sum(-1)
    return torch.where(below > 0, (x_n * y_n).sum(-1) / below.clamp_min(1e-300).sqrt(), 0.0)


def ranks(x_n: Tensor) -> Tensor:
    """From 1; equal numbers share the mean of their ranks."""
    _, where_n, count = x_n.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return (last.double() - (count.double() - 1) / 2)[where_n]


def spearman(x_n: Tensor, y_n: Tensor) -> Tensor:
    return pearson(ranks(x_n), ranks(y_n))


TABLE: dict[str, Callable[[Tensor], Tensor]] = {"accuracy": accuracy, "f1": f1, "matthews": matthews}


def confusion(labels: Sequence[int], answers: Sequence[int], classes: int) -> Tensor:
    """table_CC: how often each label got each answer."""
    cells = torch.tensor(labels, dtype=torch.int64) * classes + torch.tensor(answers, dtype=torch.int64)
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes).double()


def of_classes(
    metric: str, labels: Sequence[int], answers: Sequence[int], classes: int
) -> tuple[float, list[float]]:
    """(value, influence of each example) of accuracy, f1 or matthews.

    There are only C x C kinds of examples, so that the metric is taken again as often at most.
    """
    table_CC = confusion(labels, answers, classes)
    value = float(TABLE[metric](table_CC))
    without: dict[tuple[int, int], float] = {}
    for cell in dict.fromkeys(zip(labels, answers)):
        fewer = table_CC.clone()
        fewer[cell] -= 1
        without[cell] = float(TABLE[metric](fewer)) if len(labels) > 1 else value
    return value, shares([without[cell] for cell in zip(labels, answers)])


def of_numbers(metric: str, labels: Sequence[float], answers: Sequence[float]) -> tuple[float, list[float]]:
    """(value, influence of each example) of pearson or spearman; no influences of fewer than three examples."""
    x_n, y_n = (torch.tensor(side, dtype=torch.float64) for side in (labels, answers))
    value = float(pearson(x_n, y_n) if metric == "pearson" else spearman(x_n, y_n))
    n = len(x_n)
    if n < 3:
        return value, []  # of two, none can be left out
    left: list[float] = []
    step = max(1, CHUNK // n)
    for start in range(0, n, step):
        out = torch.arange(start, min(n, start + step))
        left += without_each(metric, x_n, y_n, out).tolist()
    return value, shares(left)


def without_each(metric: str, x_n: Tensor, y_n: Tensor, out: Tensor) -> Tensor:
    """The metric without example out[j], for each j."""
    n = len(x_n)
    others = torch.arange(n).repeat(len(out), 1)
    others = others[others != out[:, None]].view(len(out), n - 1)
    sides = []
    for z_n in (x_n, y_n):
        if metric == "pearson":
            sides.append(z_n[others])
            continue
        gone = z_n[out][:, None]  # ranks above it fall by one, those equal to it by a half
        fall = (z_n[others] > gone).double() + (z_n[others] == gone).double() / 2
        sides.append(ranks(z_n)[others] - fall)
    return pearson(*sides)


def shares(without: Sequence[float]) -> list[float]:
    """What each example moves a metric by; their `spread` is the jackknife's standard error."""
    n = len(without)
    mean = sum(without) / n if n else 0.0
    return [(n - 1) / n * (mean - value) for value in without]


def majority(train_n: Tensor, held_n: Tensor) -> float:
    """The accuracy of always answering the class that training has most often."""
    return float((held_n == train_n.long().bincount().argmax()).double().mean())
