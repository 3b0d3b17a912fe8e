"""What the benchmarks of the family and their tables rest on: counts, levels, labels apart, runs not made twice."""

from __future__ import annotations

import argparse
import json
import math
import sys
import xml.etree.ElementTree as ET
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraloom import methods
from loraloom.shapes import published

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]  # scripts, not a package
method_figure, method_settings, method_study, method_tables = (
    import_module(f"method_{name}") for name in ("figure", "settings", "study", "tables")
)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lora", 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))),
        ("vera", 32 * (5 * 4096 + 2 * 11008 + 7 * 256)),  # a layer trains O + r
        ("adapterh", 32 * 2 * (2 * 4096 * 16 + 16 + 4096)),  # the LoRA paper, section 5.1
        ("prefix_layer", 32 * 4096 * 8),
        ("full", 6_738_415_616),  # Llama-2-7B's published size
        ("loftq", 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))),
    ],
)
def test_parameters_are_counted_on_the_whole_model(name: str, count: int):
    assert method_settings.counted(name, 16, published("llama2-7b")) == count


def test_the_study_and_the_settings_name_methods_that_there_are():
    named = {name for preset in method_study.PRESETS.values() for name in preset["methods"].split(",")}
    named |= {*method_settings.OWN, *method_settings.NOTES, *method_settings.SLOW_STARTS, *method_study.NOTES}
    assert named <= set(methods.names())


def test_a_level_is_reached_on_a_line_in_the_logarithm():
    curve = [(0, 1.0), (10, 0.1), (20, 0.2)]
    assert method_tables.reached(curve, 0.1) == 10
    assert method_tables.reached(curve, math.sqrt(0.1)) == pytest.approx(5)
    assert method_tables.reached(curve, 2.0) == 0
    assert method_tables.reached(curve, 0.05) == math.inf


@given(st.lists(st.floats(0, 500), min_size=1, max_size=30).map(sorted))
def test_labels_keep_their_order_and_their_distance(wanted: list[float]):
    places = method_figure.apart(wanted, 14)
    assert all(low - high >= 14 - 1e-6 for high, low in pairwise(places))
    assert sum(places) == pytest.approx(sum(wanted), abs=1e-6 * len(wanted))  # a block moves about its middle
    if all(b - a >= 14 for a, b in pairwise(wanted)):
        assert places == pytest.approx(wanted)


def run(method: str, seed: int, loss: float, factor: float = 3.0) -> dict[str, object]:
    final = {"loss": loss, "exact_match": 1 - loss, "curve": [[0, 2.0], [10, loss]]}
    return {
        "method": method,
        "factor": factor,
        "seed": seed,
        "rate": 2e-4 * factor,
        "chosen_by": loss,
        "trained": 1000 if method == "lora" else 10,
        "train_seconds": 1.0,
        "start_seconds": 1.0,
    } | (final if seed != method_study.SEARCH_SEED else {})


def test_finished_runs_of_the_same_settings_are_kept_and_others_are_not(tmp_path: Path):
    out = tmp_path / "study.json"
    about = {"settings": {"steps": 3}, "commit": "abc", "machine": "cpu", "versions": {}}
    runs = [run("lora", 0, 0.5), {"method": "vera", "seed": 0, "factor": 1.0, "error": "killed"}]
    out.write_text(json.dumps(about | {"runs": runs}))
    a = argparse.Namespace(out=str(out))
    assert method_study.earlier(a, about) == runs[:1]
    assert method_study.earlier(a, about | {"commit": "abd"}) == []
    assert method_study.earlier(a, about | {"settings": {"steps": 4}}) == []


def test_the_rate_that_is_reported_was_searched_and_the_figure_names_every_method():
    runs = [run(name, seed, loss) for name, loss in (("lora", 0.25), ("bitfit", 0.5)) for seed in (0, 1, 2)]
    runs += [run("lora", method_study.SEARCH_SEED, 0.3, factor) for factor in (1, 3, 9)]
    table = {name: method_study.summary(name, runs) for name in ("lora", "bitfit")}
    assert table["lora"]["loss"] == {"mean": 0.25, "lowest": 0.25, "highest": 0.25}
    assert not table["lora"]["at_an_end"]
    picture = ET.fromstring(method_figure.loss_figure({"table": table, "base": {"loss": 2.0}}))
    texts = {item.text for item in picture.iter() if item.tag.endswith("text")}
    assert {"lora", "bitfit", "base 2.00"} <= texts
