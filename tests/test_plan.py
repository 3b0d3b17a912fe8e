"""Plans: the LoRA paper's figures, published counts, what fits, a real run's steps and disk, and what to change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import run_tiny, settings

from loraloom import api, cli
from loraloom.config import RunConfig, resolve, with_values
from loraloom.errors import OutOfMemory, UserError
from loraloom.fit import choose, find_gpu, largest
from loraloom.memory import Predictor
from loraloom.oom import candidates, explain_oom, savings
from loraloom.plan import plan, settings_of
from loraloom.shapes import SHAPES, published
from loraloom.workload import Assumed, assumed

PUBLISHED = {  # billions of weights as their authors and model cards give them
    "gpt3-175b": 175.0,
    "llama-65b": 65.2,
    "llama2-7b": 6.74,
    "llama2-13b": 13.02,
    "llama2-70b": 68.98,
    "llama3-8b": 8.03,
    "llama3-70b": 70.6,
    "llama3.2-1b": 1.23,
    "llama3.2-3b": 3.21,
    "mistral-7b": 7.24,
}
GPU80 = int(0.98 * 80 * 2**30)


def config(**changes: Any) -> RunConfig:
    return resolve(None, {"model": "none", "data": "none", "output": "none", **changes})[0]


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_have_the_published_number_of_weights(name):
    weights = sum(p.numel() for p in Predictor(config(r=1), published(name)).whole.model.parameters())
    assert weights / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)


def test_the_figures_of_the_lora_paper():
    """GPT-3 175B, r = 4 on q and v: section 4.2 and table 4 of arXiv:2106.09685."""
    found = api.plan(
        shape="gpt3-175b", model="gpt3-175b", r=4, target_modules=["q", "v"], train={"micro_tokens": 2048}
    )
    assert found["trainable"] == 18_874_368  # 2 * 96 layers * 2 * 12,288 * 4
    assert found["disk"]["adapter_16"] == 37_748_736
    assert found["base_bytes"] == pytest.approx(350e9, rel=0.003)
    assert found["parts"]["base"] == pytest.approx(found["base_bytes"], rel=1e-6)
    assert sum(found["full"].values()) == 16 * found["parameters"]
    assert found["paper"]["full"] == 1.2e12
    # A third of full fine-tuning, as the paper says, once both leave the activations out.
    lora = found["peak"] - found["parts"]["activations"]
    assert lora < sum(found["full"].values()) / 3


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(0, 800))
def test_largest_is_the_last_that_fits(rises, limit):
    costs = [sum(rises[: n + 1]) for n in range(len(rises))]
    fitting = [n for n, cost in enumerate(costs, 1) if cost <= limit]
    assert largest(lambda n: costs[n - 1], limit, len(costs)) == (fitting[-1] if fitting else None)


def test_straight_costs_take_few_guesses():
    asked: list[int] = []
    assert largest(lambda n: asked.append(n) or 7 * n + 1000, 71_003, 1 << 20) == 10_000
    assert len(asked) < 8


@pytest.mark.parametrize("changes", [{}, {"train.recompute": "full", "model.quantize": "nf4"}])
def test_what_fits_fits_and_the_next_size_does_not(changes):
    about, chosen = published("llama3.2-1b"), config(**changes)
    work, gpu = assumed(chosen, 131072, 1024), find_gpu("16GB")
    predictor = Predictor(chosen, about)
    tokens = choose(predictor, work, gpu, fit=True).tokens
    assert predictor.predict(work.batches(tokens)).needed <= gpu.bytes
    assert predictor.predict(work.batches(tokens + 64)).needed > gpu.bytes or tokens >= 16 * 1024


def test_nothing_fits():
    with pytest.raises(UserError, match=r"the smallest pass needs 1\d\.\d GB, a GPU of 8 GB has 8\.4"):
        api.plan(shape="llama3-8b", model="llama3-8b", gpu="8GB", fit=True)


def test_fit_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU here"):
        api.plan(shape="llama2-7b", model="llama2-7b", train={"micro_tokens": "fit"})


@pytest.mark.parametrize("text", ["80GB", "80", "80 GiB", "80g"])
def test_a_gpu_by_its_size(text):
    assert find_gpu(text).bytes == GPU80


@given(
    st.integers(1, 20000), st.integers(1, 9000), st.one_of(st.none(), st.integers(1, 30000)), st.booleans()
)
def test_made_up_rows_use_all_the_tokens_of_a_pass(micro, longest, step, packing):
    """Else leftover tokens would cost nothing, and a pass of shorter rows would not fit where it was said to."""
    rows, length = Assumed(longest, 8192, packing, step).rows(micro)
    assert rows * length <= max(micro, min(longest, 8192))
    if step is None:
        assert rows * length > micro - rows
    else:  # a row is filled up to a multiple of 64, at least 256
        assert rows * length <= max(step, longest + 63, 256)


def test_what_was_set_is_not_advised():
    shape, work = published("llama3-70b"), assumed(config(), 8192, 1024)
    least = config(**{"model.quantize": "nf4", "train.recompute": "offload"})
    with pytest.raises(UserError, match="the smallest pass") as caught:
        choose(Predictor(least, shape), work, find_gpu("24GB"), fit=True)
    assert "--set" not in caught.value.hint


def test_paged_moments_of_sgd_are_refused_as_in_training():
    with pytest.raises(UserError, match=r"train\.paged"):
        Predictor(config(**{"train.paged": True, "train.optimizer": "sgd"}), published("llama3.2-1b"))


@pytest.mark.parametrize("text", ["big", "0GB", "80TB"])
def test_no_gpu_size(text):
    with pytest.raises(UserError, match="is no size"):
        find_gpu(text)


def test_the_nearest_shape_is_named():
    with pytest.raises(UserError) as caught:
        published("llama3-7b")
    assert "llama3-70b" in caught.value.hint


def test_no_model_is_named():
    with pytest.raises(UserError, match="which model"):
        settings_of(None, {})


def test_a_config_json_is_enough(model_folder, tmp_path, capsys):
    shutil.copy(model_folder / "config.json", tmp_path / "config.json")
    assert (
        cli.run(["plan", "-m", str(tmp_path), "--tokens", "256", "--length", "64", "--gpu", "1GB", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["micro_tokens"] == 256
    assert found["parameters_in_files"] is None
    assert found["steps"] is None
    assert found["fits"] is True
    assert sum(found["parts"].values()) < found["peak"] < found["needed"] < 2**30


def test_data_needs_a_tokenizer(model_folder, data_file, tmp_path):
    shutil.copy(model_folder / "config.json", tmp_path / "config.json")
    with pytest.raises(UserError, match="has no tokenizer"):
        api.plan(model=str(tmp_path), data=str(data_file))
    with pytest.raises(UserError, match="no tokenizer to read the data"):
        api.plan(shape="llama2-7b", model="llama2-7b", data=str(data_file))


def test_the_files_agree_about_the_number_of_weights(model_folder):
    found = api.plan(model=str(model_folder))
    assert found["parameters_in_files"] == found["parameters"]


def test_a_plan_on_the_screen(capsys):
    arguments = [
        "--shape",
        "llama2-7b",
        "--tokens",
        "8192",
        "--length",
        "2048",
        "--gpu",
        "80GB",
        "--set",
        "train.batch_size=4",
    ]
    assert cli.run(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    for words in ("6,738,415,616 weights", "39,976,960 weights train", "4 rows of 2,048 tokens", "activations",
                  "yes, into 84.2 GB", "1.2 TB in the LoRA paper", "unknown without data"):  # fmt: skip
        assert words in text


def test_a_plan_shows_every_recomputation_and_takes_the_least_that_fits(capsys):
    arguments = ["--shape", "llama3.2-1b", "--tokens", "8192", "--length", "2048", "--json"]
    assert cli.run(["plan", *arguments, "--gpu", "80GB"]) == 0
    roomy = json.loads(capsys.readouterr().out)
    rows = {row["recompute"]: row for row in roomy["tiers"]}
    assert list(rows) == ["none", "gate_up", "full", "offload"]
    assert roomy["recompute"] == "none"
    assert roomy["peak"] == rows["none"]["peak"]
    needed = {name: row["needed"] for name, row in rows.items() if row["needed"]}
    assert list(needed.values()) == sorted(needed.values(), reverse=True)
    room = (needed["full"] + needed.get("gate_up", needed["none"])) / 2 / 2**30 / 0.98
    assert cli.run(["plan", *arguments, "--gpu", f"{room:.2f}GB"]) == 0
    tight = json.loads(capsys.readouterr().out)
    assert tight["recompute"] == "full"
    assert "would need" in tight["reason"]
    assert [row["fits"] for row in tight["tiers"]][-2:] == [True, True]
    assert tight["tiers"][0]["fits"] is False


def test_a_plan_says_what_the_run_then_does(model_folder, data_file, tmp_path, quick):
    chosen = settings(model_folder, data_file, tmp_path / "run", train__save_every=5)
    found = plan(resolve(None, chosen)[0], offline=True)
    run = run_tiny(model_folder, data_file, tmp_path / "run", train__save_every=5)
    assert found.steps["steps"] == run.state["steps"]
    assert found.trainable == run.state["trainable"]
    assert found.parameters == run.state["total"]
    assert found.steps["examples"] == 20
    written = max(sum(file.stat().st_size for file in path.rglob("*")) for _, path in run.checkpoints())
    names = 512 * 4 * found.adapted * 2  # headers, and the names of each tensor and its moments
    assert found.disk["checkpoint"] <= written <= found.disk["checkpoint"] + names + 20_000


def test_passes_of_real_data_are_the_ones_that_are_packed(model_folder, data_file):
    chosen = config(**{"model": str(model_folder), "data": str(data_file), "train.batch_size": 8})
    small, large = (
        plan(with_values(chosen, {"train.micro_tokens": tokens}), offline=True).parts["activations"]
        for tokens in (64, 4096)
    )
    assert small < large


def test_the_two_changes_that_save_most_are_named(monkeypatch):
    about, chosen = published("llama3.2-1b"), config(**{"train.batch_size": 2})
    work = assumed(chosen, 4096, 2048)
    ranked = savings(chosen, about, work, 4096)
    assert [change.words for change in ranked[:2]] == [
        "train.recompute=full",
        "train.micro_tokens=2048",
    ]
    assert [change.saved for change in ranked] == sorted((change.saved for change in ranked), reverse=True)
    now = Predictor(chosen, about).predict(work.batches(4096)).allocated
    after = Predictor(with_values(chosen, ranked[1].settings), about).predict(work.batches(2048)).allocated
    assert ranked[1].saved == now - after > 0
    monkeypatch.setattr("loraloom.oom.savings", lambda *_, **__: ranked)
    error = explain_oom(chosen, about, work, 4096, total=40 * 10**9, said="CUDA out of memory. Tried\nmore")
    assert isinstance(error, OutOfMemory)
    assert "what grew with the batch is activations" in error.message
    assert error.details[0] == "CUDA out of memory. Tried"
    assert error.details[-2].endswith(f"saves {ranked[0].saved / 1e9:.2f} GB")
    assert error.hint == "--set train.recompute=full --set train.micro_tokens=2048"


def test_what_is_done_already_is_not_advised():
    chosen = config(r=8, **{"train.recompute": "offload", "model.quantize": "nf4"})
    assert list(candidates(chosen, 256)) == [{"train.optimizer": "adamw8bit"}]
    for tier, other in (("auto", "full"), ("none", "full"), ("gate_up", "full"), ("full", "offload")):
        assert {"train.recompute": other} in list(candidates(config(**{"train.recompute": tier}), 256))
    assert {"r": 32} in list(candidates(config(r=64), 8192))


def test_a_moderate_batch_of_a_large_model_is_told_to_quantise():
    about, chosen = published("llama2-13b"), config(**{"r": 8, "train.batch_size": 1})
    first = savings(chosen, about, assumed(chosen, 4096, 256), 256)[0]
    assert first.settings == {"model.quantize": "nf4"}
    assert first.saved == pytest.approx(12.7e9 * 2 * (1 - 4.127 / 16), rel=0.05)  # the linear layers' share


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(UserError):
        api.plan(model=str(tmp_path))
