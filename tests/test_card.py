"""The model card: valid front matter, true figures, no local path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_run import EVIL, finished_run, make_run

from loraloom.card import hub_base, model_card


def head_of(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_card_of_a_finished_run(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "tickets", {"data": "hf:org/set", "method": "rslora", "r": 16})
    card = model_card(run)
    assert head_of(card) == {
        "base_model": "org/small-model",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "rslora", "loraloom"],
        "datasets": ["org/set"],
    }
    assert "| loss | 2.904 ± 0.021 | 1.187 ± 0.021 | better |" in card
    assert "from_pretrained('org/small-model')" in card
    assert "12\u202f402 of 12\u202f431 rows used" in card
    assert "| r | 16 |" in card
    assert "torch " in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    "model", ["models/small", "/data/models/small", "./small", "small.gguf", "org/small.gguf"]
)
def test_a_local_base_is_not_named(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "small").mkdir(parents=True)
    run = finished_run(tmp_path / "run", {"model": model, "data": "/home/me/private/tickets.csv"})
    (tmp_path / "models" / "small").rmdir()  # what counts is what it was when the run began
    card = model_card(run)
    assert hub_base(run) is None
    assert "base_model" not in head_of(card)
    assert "datasets" not in head_of(card)
    assert "private" not in card
    assert "/data/models" not in card


def test_card_of_a_failed_run_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "failed")
    run.update(status="failed")
    run.add_check("finite", False, "nan")
    card = model_card(run)
    assert "**Training did not finish: failed.**" in card
    assert "Not measured." in card
    assert "These checks failed: finite" in card


def test_users_text_cannot_break_out(tmp_path: Path) -> None:
    run = finished_run(
        tmp_path / "run", {"data": EVIL + "`\n---\nbase_model: other|", "target_modules": "a|<b>"}
    )
    run.add_check("<img src=x>\n# title", False, "")
    card = model_card(run)
    assert head_of(card)["base_model"] == "org/small-model"
    assert "\n# title" not in card
    assert "<img src=x>\n" not in card
    assert r"a\|\<b\>" in card
