"""Every method through the commands, as a user goes: train, stop and resume, evaluate, chat, merge."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import make_data, make_model, run_tiny, timeless

from loraloom import api, methods
from loraloom.adapter_files import FILES, read_record
from loraloom.methods.base import NotMergeable
from loraloom.rundir import Run
from loraloom.workshop import spec_of

SMALL = {"r": 4, "train__max_steps": 4, "train__save_every": 2, "eval__every": 2, "train__batch_size": 4}
OWN: dict[str, dict[str, object]] = {
    "alora": {"method.invocation": " is"},
    "bitfit": {"method.add_missing": True},
    "loftq": {"model.quantize": "nf4"},
    "loradrop": {"method.probe_steps": 2, "method.samples": 8},
    "eva": {"method.samples": 8},
    "corda": {"method.samples": 8},
    "loraga": {"method.samples": 8},
    "loraone": {"method.samples": 8},
    "deltalora": {"method.start": 1},
    "prefix_embedding": {"method.infix": 2},
    "prefix_layer": {"method.infix": 2},
    "lora_prefix": {"method.kind": "layer"},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("verbs")
    return make_model(folder / "model"), make_data(folder / "rows.jsonl")


def settings_of(method: str) -> dict[str, object]:
    own = {key.replace(".", "__"): value for key, value in OWN.get(method, {}).items()}
    return SMALL | {"method__name": method, "train__learning_rate": "auto"} | own


class Stop(Exception):
    """Ends a run as a crash would."""


def stopping_after(step: int):
    def listen(kind, record):
        if kind == "checkpoint" and record.name == f"step-{step:06d}":
            raise Stop

    return listen


@pytest.mark.parametrize("method", methods.names())
def test_a_method_goes_through_every_verb(method, places, tmp_path):
    model, data = places
    whole = run_tiny(model, data, tmp_path / "whole", **settings_of(method))
    assert whole.state["status"] == "done"
    assert whole.state["trainable"] > 0
    record = read_record(whole.adapter_path)
    assert record is not None
    assert all((whole.adapter_path / name).is_file() for name in FILES[record.form])

    with pytest.raises(Stop):
        run_tiny(model, data, tmp_path / "cut", listen=stopping_after(2), **settings_of(method))
    again = api.resume(tmp_path / "cut", offline=True)
    assert timeless(again.metrics()) == timeless(whole.metrics())
    for name in FILES[record.form]:
        if name != "adapter_config.json":
            assert (again.adapter_path / name).read_bytes() == (whole.adapter_path / name).read_bytes(), name

    result = api.evaluate(whole.path, offline=True, max_new_tokens=3)
    [loss] = [row for row in result["rows"] if row["metric"] == "loss"]
    assert loss["tuned"]["value"] == pytest.approx(best_loss(whole), rel=1e-5)
    said = "".join(
        api.converse(api.open_target(whole.path, offline=True), max_new_tokens=3).ask("what is 1 and 2")
    )
    assert isinstance(said, str)

    mergeable = spec_of(whole.config).make().mergeable
    if not mergeable:
        with pytest.raises(NotMergeable, match=f"{method} cannot be merged: "):
            api.merge(whole.path, tmp_path / "merged", offline=True)
        return
    merged = api.merge(whole.path, tmp_path / "merged", offline=True)
    assert merged.ok


def best_loss(run: Run) -> float:
    return float(run.state["best"]["loss"])
