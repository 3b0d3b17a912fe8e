"""--offline and Hugging Face sets: only what is cached, and at once a clear error for what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tiny_labels import make_encoder, tokenizer

from loraloom import cli
from loraloom.config import DataConfig, Source
from loraloom.data import prepare_labels
from loraloom.data.tables import hf_rows
from loraloom.errors import DataError

datasets = pytest.importorskip("datasets")
ROWS = [{"sentence1": f"w{i}", "sentence2": f"w{i + 1}", "label": i % 2} for i in range(30)]
SIDES = {"train": ROWS[:20], "validation": ROWS[20:]}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as the datasets library leaves it after glue:rte was fetched once."""
    made = tmp_path / "made"
    for split, rows in SIDES.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in SIDES}
    datasets.load_dataset("json", data_files=files, cache_dir=str(made))
    [info] = made.rglob("dataset_info.json")
    folder = tmp_path / "cache" / "nyu-mll___glue" / "rte" / "0.0.0" / info.parent.name
    folder.parent.mkdir(parents=True)
    info.parent.rename(folder)
    for path in folder.glob("json-*.arrow"):
        path.rename(path.with_name(path.name.replace("json-", "glue-")))
    known = json.loads((folder / "dataset_info.json").read_text())
    known |= {"dataset_name": "glue", "config_name": "rte"}
    known["splits"] = {k: v | {"dataset_name": "glue"} for k, v in known["splits"].items()}
    (folder / "dataset_info.json").write_text(json.dumps(known))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("offline", [True, False])
def test_the_library_is_told_not_to_ask_the_hub(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        told.append((constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    assert len(list(hf_rows("hf:org/set", "train", offline=offline))) == len(ROWS)
    assert told == [(offline, offline)]
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_what_is_cached_is_read(cache: Path) -> None:
    config = DataConfig(train=[Source(path="glue:rte")])
    found = prepare_labels(config, tokenizer(), model_max_length=40, offline=True, progress=False)
    assert found.report.labels == ["0", "1"]
    assert (len(found.train), len(found.eval)) == (20, 10)  # its validation split


@pytest.mark.parametrize("source", ["hf:org/other", "hf:nyu-mll/glue:sst2"])
def test_what_is_not_cached_is_an_error_that_says_where_it_looked(cache: Path, source: str) -> None:
    with pytest.raises(DataError) as caught:
        list(hf_rows(source, "train", offline=True))
    assert caught.value.message == f"offline, and {source} is not in the cache of data sets"
    assert str(cache) in caught.value.details[0]
    assert "--offline" in str(caught.value.hint)


@pytest.mark.parametrize("words", [["train", "-o", "RUN"], ["data"], ["plan"], ["study"]])
def test_every_command_with_offline_says_so(
    words: list[str], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub is refused by the library itself, so that no request can be made."""
    model = str(make_encoder(tmp_path / "model", "llama"))
    words = [str(tmp_path / "run") if word == "RUN" else word for word in words]
    if words == ["study"]:
        run = {"model": model, "data": {"train": "hf:org/other"}, "train": {"max_steps": 2}}
        (tmp_path / "s.yaml").write_text(json.dumps({"asks": "is it there?", "run": run}))
        given = ["study", str(tmp_path / "s.yaml"), "-o", str(tmp_path / "out")]
    elif words == ["data"]:
        given = ["data", "hf:org/other", "-m", model]
    else:
        given = [*words, "-m", model, "-d", "hf:org/other"]
    assert cli.run([*given, "--offline"]) == DataError.exit_code
    said = capsys.readouterr().err
    assert "offline, and hf:org/other is not in the cache" in said
    assert not (tmp_path / "run").exists()
