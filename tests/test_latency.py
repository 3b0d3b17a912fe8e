"""Timing of forward passes: the models that are timed, an order in which drift cancels, intervals that hold."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraloom import cli, latency
from loraloom.errors import UserError
from loraloom.latency import AGAIN, BASE, MERGED, UNMERGED, Case, bottleneck, case_of, interval, says
from loraloom.skeleton import make_shape, meta_model

TINY = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 60}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base() -> Any:
    return latency.filled(meta_model(make_shape("gpt2", **TINY), dtype=torch.float32), CPU, 0)


def test_the_models_that_are_timed(base: Any) -> None:
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    models, weights = latency.variants(base, 3000, 0)
    assert list(models) == [BASE, AGAIN, MERGED, UNMERGED, "AdapterL", "AdapterH"]
    ids = torch.randint(0, 60, (2, 9))
    logits = {name: latency.run(model, ids) for name, model in models.items()}
    assert logits[BASE].shape == (2, 1, 60)
    torch.testing.assert_close(logits[MERGED], logits[UNMERGED], rtol=1e-5, atol=1e-5)
    assert (logits[MERGED] - logits[BASE]).abs().max() > 1e-4
    torch.testing.assert_close(logits["AdapterL"], logits[BASE])  # bottlenecks begin at zero
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert weights == {
        BASE: 0,
        AGAIN: 0,
        MERGED: 0,
        UNMERGED: 2 * 2 * 4 * 64,
        "AdapterL": 3052,
        "AdapterH": 2988,
    }


def test_a_merged_model_runs_without_any_of_our_code(base: Any) -> None:
    models, _ = latency.variants(base, 3000, 0)
    for module in models[MERGED].modules():
        assert "loraloom" not in type(module).__module__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    own = dict(models[MERGED].named_parameters())
    shared = [name for name, p in base.named_parameters() if own[name] is p]
    assert len(own) - len(shared) == 2  # the fused q, k, v of two layers


@pytest.mark.parametrize(("method", "names"), [("adapterl", "AdapterL"), ("adapterh", "AdapterH")])
def test_bottlenecks_are_as_large_as_in_the_paper(method: str, names: str) -> None:
    """Table 3 of arXiv:2106.09685 has 11.09 M for both at GPT-2 medium; the count is that of section 5.1."""
    about = make_shape("gpt2", **latency.GPT2_MEDIUM)
    r, d, layers = bottleneck(method, about, 11_090_000), 1024, 24
    count = layers * (2 * d * r + r + d + 2 * d) if method == "adapterl" else 2 * layers * (2 * d * r + r + d)
    assert count == pytest.approx(11.09e6, rel=0.005)
    assert bottleneck(method, about, 500_000) in (5, 9)


def test_drift_falls_on_all_alike(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that gets three times slower while it measures, the ratios come out as they are."""
    now, costs = [0.0], {BASE: 1.0, AGAIN: 1.0, MERGED: 1.0, UNMERGED: 1.05, "AdapterL": 1.2, "AdapterH": 1.3}
    noise = random.Random(1)

    def run(model: Any, ids: Any) -> Any:
        name = next(name for name, one in models.items() if one is model)
        now[0] += costs[name] * (1 + now[0] / 200) * noise.gauss(1, 0.002)

    models, weights = latency.variants(base, 3000, 0)
    monkeypatch.setattr(latency, "run", run)
    times = latency.timed(models, torch.zeros(1, 4), 40, CPU, lambda: now[0], seed=0)
    assert times[BASE][-1] > 2 * times[BASE][0]
    row = latency.summary(Case(1, 4, 0), times, weights)
    for name, cost in costs.items():
        assert row["variants"][name]["overhead"] == pytest.approx(cost - 1, abs=0.01)
    low, high = row["variants"][MERGED]["interval"]
    assert low < 0 < high
    assert "base, again is within the noise of itself" in row["says"][0]
    assert "within the noise of the base" in row["says"][1]
    assert "slower" in row["says"][4]


def test_the_interval_holds_the_median() -> None:
    """In at least 95 of 100 draws, of a crooked distribution too."""
    draw = random.Random(0)
    for size in (6, 12, 25):
        found = [interval([draw.expovariate(1) for _ in range(size)]) for _ in range(2000)]
        held = sum(low <= 0.6931 <= high for low, high in found if (low, high))  # its median is ln 2
        assert held / 2000 > 0.94


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=40))
def test_an_interval_lies_around_the_median(values: list[float]) -> None:
    found = interval(values)
    assert found is not None
    assert found[0] <= sorted(values)[len(values) // 2] <= found[1]


def test_few_rounds_know_no_noise() -> None:
    assert interval([0.1] * 5) is None
    assert "too few rounds" in says("x", {"overhead": 0.1, "interval": None})


def test_words_follow_the_interval() -> None:
    assert "within the noise" in says("x", {"overhead": 0.01, "interval": (-0.01, 0.02)})
    assert "2.0 % slower" in says("x", {"overhead": 0.02, "interval": (0.01, 0.03)}).replace("\u202f", " ")
    assert "faster" in says("x", {"overhead": -0.02, "interval": (-0.03, -0.01)})


def test_cases_are_read_and_refused() -> None:
    assert case_of("32x512") == Case(32, 512, 500_000)
    assert case_of("2X8") == Case(2, 8, 11_000_000)
    for text in ("32", "0x4", "ax4"):
        with pytest.raises(UserError, match="batch x length"):
            case_of(text)
    with pytest.raises(UserError, match="one thread"):
        latency.measure([Case(1, 8, 1)], device=torch.device("cuda"), shape=TINY, clock="cpu")
    with pytest.raises(UserError, match="takes 64"):
        latency.measure([Case(1, 65, 1)], device=CPU, shape=TINY)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "GPT2_MEDIUM", TINY)
    options = ["--case", "1x16", "--case", "2x8", "--rounds", "7", "--device", "cpu"]
    assert cli.run(["latency", *options, "-o", str(tmp_path / "out.json")]) == 0
    said = capsys.readouterr().out
    assert "1 x 16" in said
    assert "LoRA, merged" in said
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["rounds"] == 7
    assert [(row["batch"], row["length"]) for row in record["cases"]] == [(1, 16), (2, 8)]
    assert all(row["merged_apart"] < 1e-5 for row in record["cases"])
    assert cli.run(["study", "latency"]) == 2
    assert "loraloom latency" in capsys.readouterr().err
