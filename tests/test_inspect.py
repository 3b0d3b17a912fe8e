"""`inspect` on folders of every method, ours and PEFT's, against numpy's SVDs of what merging and PEFT compute."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from model_folders import deep_folder
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file, save_file
from test_quant import written
from tiny_run import make_model, run_tiny

from loraloom import figures, fold, inspect_page, inspection, methods
from loraloom.adapt import attach
from loraloom.adapter_io import save_adapter
from loraloom.analysis import expected_similarity
from loraloom.cli import run as cli
from loraloom.config import ModelConfig
from loraloom.errors import UserError
from loraloom.model import load_model
from loraloom.quant import quantized
from loraloom.rundir import Run

OWN: dict[str, dict[str, Any]] = {
    "bitfit": {"add_missing": True},
    "alora": {"invocation": [7]},
    "prefix_embedding": {"prefix": 2},
    "prefix_layer": {"prefix": 2},
}
CHANGE_NOTHING = {"adapterh", "adapterl", "bitfit", "prefix_embedding", "prefix_layer"}
NOT_MERGED = {
    "alora",
    "lora_prefix",
}  # their pair touches some tokens, or stands beside what is no change of W
NEED_W = {"dora", "hira"}  # whose update cannot be known from the adapter's file
ONE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("inspect") / "base")


def adapter_of(base: Path, folder: Path, method: str = "lora", *, seed: int = 0, **settings: Any) -> Path:
    """An adapter trained by nobody: noise on every tensor that trains."""
    model = load_model(ModelConfig(id=str(base), dtype="float32", device="cpu"), offline=True, progress=False)
    adapters = attach(model.model, method, seed=seed, **({"r": 3} | OWN.get(method, {}) | settings))
    gen = torch.Generator().manual_seed(seed + 10)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=gen)
    save_adapter(adapters, folder, base_model=str(base))
    return folder


def weights(folder: Path) -> dict[str, Any]:
    return {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["layers"]}


def check_layer(row: dict[str, Any], w: Any, delta: Any, rtol: float = 1e-4) -> None:
    """Every number of a line of the table, by its definition."""
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    assert row["norm"] == pytest.approx(np.linalg.norm(delta), rel=rtol)
    count = len(row["singular_values"])
    np.testing.assert_allclose(row["singular_values"], s[:count], atol=rtol * s[0])
    assert np.all(s[count:] < rtol * s[0])
    share = s**2 / (s**2).sum()
    share = share[share > 0]
    assert row["effective_rank"] == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-3)
    assert row["stable_rank"] == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-3)
    assert row["norm_W"] == pytest.approx(np.linalg.norm(w), rel=1e-5)
    assert row["ratio"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(w), rel=1e-3)
    r = row["projections"]["r"]
    own = np.linalg.svd(w, compute_uv=False)[:r]
    assert row["projections"]["own"] == pytest.approx(np.linalg.norm(own), rel=1e-4)
    inside = np.linalg.norm(u[:, :r].T @ w @ vh[:r].T)
    gap = r < len(s) and s[r - 1] - s[r] < 0.05 * s[0]  # then the last direction is not sharply one
    if not gap:
        assert row["projections"]["update"] == pytest.approx(inside, rel=0.01, abs=1e-3)
    assert row["amplification"] == pytest.approx(row["norm"] / row["projections"]["update"], rel=1e-6)


@pytest.mark.parametrize(
    "method", [name for name in methods.names() if name not in CHANGE_NOTHING and name != "loftq"]
)
def test_every_method_against_what_merging_writes(method: str, base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", method)
    found = inspection.inspect(adapter, offline=True)
    rows = by_name(found)
    assert rows
    assert all(row["state"] == "learnt" for row in rows.values())
    assert found["adapter"]["method"] == method
    before = weights(base)
    if method in NOT_MERGED:
        tensors = {
            key: tensor.double().numpy() for key, tensor in load_file(next(adapter.glob("*.safe*"))).items()
        }
        for name, row in rows.items():
            [a] = [
                tensor
                for key, tensor in tensors.items()
                if f"{name}" in key and key.endswith(("_A.weight", "/A"))
            ]
            [b] = [
                tensor
                for key, tensor in tensors.items()
                if f"{name}" in key and key.endswith(("_B.weight", "/B"))
            ]
            check_layer(row, before[f"{name}.weight"], 2 * b @ a)
        assert len(rows) == 14
        return
    fold.merge(adapter, tmp_path / "merged", dtype="float32", offline=True, no_verify=True)
    after = weights(tmp_path / "merged")
    for name, row in rows.items():
        w = before[f"{name}.weight"]
        delta = after.get(f"{name}.weight", w) - w
        if "embed" in name:
            w, delta = w.T, delta.T
        check_layer(row, w, delta)
    assert len(rows) >= 14 or method == "loradrop"


@pytest.mark.parametrize("method", sorted(CHANGE_NOTHING))
def test_a_method_that_changes_no_matrix_is_refused(method: str, base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", method)
    with pytest.raises(UserError, match="changes no matrix"):
        inspection.inspect(adapter, offline=True)


PEFT_CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
    "rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["v_proj", "down_proj"]
    ),
    "ranks": lambda: peft.LoraConfig(
        r=2,
        rank_pattern={"down_proj": 5},
        alpha_pattern={"q_proj": 9},
        target_modules=["q_proj", "down_proj"],
    ),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["o_proj", "down_proj"]),
    "hira": lambda: peft.HiraConfig(r=3, target_modules=["q_proj", "down_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=["q_proj", "down_proj"]
    ),
}


def peft_folder(base: Path, folder: Path, config: Any, seed: int = 0) -> Any:
    """A folder that PEFT wrote, and PEFT's model with the adapter."""
    model = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    with_adapter = peft.get_peft_model(model, config)
    with torch.no_grad():
        for _name, parameter in with_adapter.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    with_adapter.save_pretrained(folder)
    return with_adapter


def peft_deltas(model: Any) -> dict[str, Any]:
    """Of each module, by PEFT's own word."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_a_folder_of_pefts_against_its_delta_weights(kind: str, base: Path, tmp_path: Path) -> None:
    theirs = peft_deltas(peft_folder(base, tmp_path / "adapter", PEFT_CONFIGS[kind]()))
    found = inspection.inspect(tmp_path / "adapter", offline=True)
    rows, before = by_name(found), weights(base)
    assert rows.keys() == theirs.keys()
    assert len(rows) == 4
    for name, row in rows.items():
        w = before[f"{name}.weight"]
        check_layer(row, w, theirs[name] * w if kind == "hira" else theirs[name])  # of HiRA it is B A alone


@pytest.mark.filterwarnings("ignore")
def test_intruders_are_those_that_peft_counts(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")
    model = peft_folder(base, tmp_path / "adapter", config)
    said: list[str] = []
    reduce_intruder_dimension(model, top_k=6, threshold_epsilon=0.6, logging_sink=said.append)
    theirs = {}
    for line in said[:-1]:
        name, _, told = line.partition(": ")
        count = 0 if told == "No intruders" else int(told.removeprefix("Intruders: "))
        theirs[name.removeprefix("base_model.model.")] = count
    found = inspection.inspect(tmp_path / "adapter", offline=True, k=6, epsilon=0.6)
    assert {name: row["intruders"] for name, row in by_name(found).items()} == theirs
    assert sum(theirs.values()) > 3  # else nothing was compared


def test_phi_of_two_adapters_is_that_of_their_files(base: Path, tmp_path: Path) -> None:
    one = adapter_of(base, tmp_path / "one", r=3, seed=1)
    two = adapter_of(base, tmp_path / "two", r=6, seed=2)
    found = inspection.inspect(one, two, offline=True, layers=())
    comparison = found["comparison"]
    assert len(comparison["layers"]) == 14
    assert not comparison["notes"]
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    for pair in comparison["layers"]:
        key = f"base_model.model.{pair['name']}.lora_%s.weight"
        for side in "AB":
            m1, m2 = (t[key % side].double().numpy() for t in (first, second))
            if side == "A":
                v1, v2 = (np.linalg.svd(m, full_matrices=False)[2].T for m in (m1, m2))
            else:
                v1, v2 = (np.linalg.svd(m, full_matrices=False)[0] for m in (m1, m2))
            got = pair["sides"][side]
            truth = [
                [np.linalg.norm(v1[:, :i].T @ v2[:, :j]) ** 2 / min(i, j) for j in range(1, v2.shape[1] + 1)]
                for i in range(1, v1.shape[1] + 1)
            ]
            np.testing.assert_allclose(got["phi"], truth, atol=1e-4)
            assert got["first"] == pytest.approx(truth[0][0], abs=1e-9)
            assert got["expected"] == expected_similarity(3, 6, len(v1))
        updates = [2 * t[key % "B"].double().numpy() @ t[key % "A"].double().numpy() for t in (first, second)]
        (u1, _, _), (u2, _, _) = (np.linalg.svd(m) for m in updates)
        truth = np.linalg.norm(u1[:, :3].T @ u2[:, :6]) ** 2 / 3
        assert pair["sides"]["U"]["all"] == pytest.approx(truth, rel=1e-6)


def test_phi_is_kept_whole_for_the_chosen_layers_alone(base: Path, tmp_path: Path) -> None:
    one, two = adapter_of(base, tmp_path / "one", seed=1), adapter_of(base, tmp_path / "two", seed=2)

    def kept(**wanted: Any) -> set[int]:
        found = inspection.inspect(one, two, offline=True, base=False, **wanted)
        return {pair["number"] for pair in found["comparison"]["layers"] if "phi" in pair["sides"]["A"]}

    assert (kept(), kept(layers=(0,)), kept(layers=())) == ({1}, {0}, {0, 1})
    with pytest.raises(UserError, match="no adapter on layer 7"):
        kept(layers=(7,))


def test_a_common_start_is_said(base: Path, tmp_path: Path) -> None:
    one, two = adapter_of(base, tmp_path / "one", r=3), adapter_of(base, tmp_path / "two", r=6)
    [note] = inspection.inspect(one, two, offline=True, base=False)["comparison"]["notes"]
    assert "seed 0" in note


@pytest.mark.parametrize("method", ["lora", "adalora", "pissa", "deltalora", "dora", "hira", "vera"])
def test_without_its_base_an_adapter_is_what_it_is_with_it(method: str, base: Path, tmp_path: Path) -> None:
    one = adapter_of(base, tmp_path / "one", method, seed=1)
    two = adapter_of(base, tmp_path / "two", method, seed=2)
    if method == "vera":  # its file does not tell the widths of its layers
        with pytest.raises(UserError, match="without its base nothing can be said"):
            inspection.inspect(one, offline=True, base=False)
        return
    alone = inspection.inspect(one, two, offline=True, base=False)
    whole = inspection.inspect(one, two, offline=True)
    assert alone["base"] is None
    assert "not measured" not in alone["notes"]
    assert any("nothing here is measured against W" in note for note in alone["notes"])
    if method in NEED_W:
        assert not alone["layers"]
    else:
        assert by_name(alone).keys() == by_name(whole).keys()
        for row, full in ((row, by_name(whole)[row["name"]]) for row in alone["layers"]):
            assert "ratio" not in row
            assert row["norm"] == pytest.approx(full["norm"], rel=1e-5)
            assert row["effective_rank"] == pytest.approx(full["effective_rank"], rel=1e-5)
    full_pairs = by_name(whole["comparison"])
    assert len(full_pairs) == len(alone["comparison"]["layers"]) == 14
    for row in alone["comparison"]["layers"]:
        full = full_pairs[row["name"]]
        for side in row["sides"]:
            assert row["sides"][side]["diagonal"] == pytest.approx(full["sides"][side]["diagonal"], abs=2e-4)


def test_a_base_that_is_not_here_is_left_out_and_one_that_is_named_is_not(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "who/knows"})
    )
    found = inspection.inspect(adapter, offline=True)
    assert found["base"] is None
    assert any("who/knows" in note for note in found["notes"])
    with pytest.raises(UserError, match="nowhere"):
        inspection.inspect(adapter, model="nowhere/at-all", offline=True)
    assert inspection.inspect(adapter, model=str(base), offline=True)["base"] == str(base)


def test_layers_that_did_not_learn_are_named(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{ONE}.lora_B.weight"].zero_()
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] *= 1e-6
    save_file(tensors, path)
    found = inspection.inspect(adapter, offline=True)
    assert by_name(found)[ONE]["state"] == "zero: B is zero"
    check = next(check for check in found["checks"] if check["name"] == "every layer learnt")
    assert check["level"] == "bad"
    assert ONE in check["detail"]
    assert "B is zero" in check["detail"]
    assert inspect_page.worst_first(found["layers"])[0]["name"] == ONE
    tensors[f"base_model.model.{ONE}.lora_B.weight"] += 0.1
    save_file(tensors, path)
    check = inspection.inspect(adapter, offline=True)["checks"][1]
    assert check["level"] == "warn"
    assert "layers.0.self_attn.q_proj" in check["detail"]


def test_what_is_not_finite_is_found_and_the_rest_is_still_measured(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{ONE}.lora_A.weight"][0, 0] = math.nan
    save_file(tensors, path)
    found = inspection.inspect(adapter, offline=True)
    assert [row["name"] for row in found["layers"] if row["state"] == "not finite"] == [ONE]
    assert found["checks"][0]["level"] == "bad"
    assert ONE in found["checks"][0]["detail"]
    assert len([row for row in found["layers"] if "ratio" in row]) == 13
    json.loads(json.dumps(found, allow_nan=False))


def test_rounding_is_judged(base: Path, tmp_path: Path) -> None:
    def levels(scale: float) -> list[str]:
        folder = adapter_of(base, tmp_path / f"adapter-{scale}")
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        for key in tensors:
            if "lora_B" in key:
                tensors[key] *= scale
        save_file(tensors, path)
        found = inspection.inspect(folder, offline=True)
        json.dumps(found, allow_nan=False)
        return [check["level"] for check in found["checks"] if check["name"].startswith("merging")]

    assert levels(100.0) == ["good", "good"]
    assert levels(0.01) == ["warn", "warn"]
    assert levels(1e7) == ["good", "bad"]  # float16 ends at 65,504


@pytest.mark.parametrize("method", ["lora", "dora", "hira", "loftq"])
def test_a_base_in_4_bits_is_the_one_that_training_saw(method: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "base", "llama", dtype=torch.bfloat16)
    kept = {"quantize": "nf4", "double_quant": False}
    loaded = load_model(
        ModelConfig(id=str(folder), dtype="float32", device="cpu", **kept), offline=True, progress=False
    )
    adapters = attach(loaded.model, method, r=2)
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=gen)
    save_adapter(
        adapters, tmp_path / "adapter", base_model=str(folder), trained_on=kept | {"dtype": "float32"}
    )
    rows = by_name(inspection.inspect(tmp_path / "adapter", offline=True))
    dense = load_file(folder / "model.safetensors")
    for key, site in adapters.adapters["default"].sites.items():
        name = f"{key}.weight"
        w = quantized(dense[name].float(), table="nf4", double=False)
        decoded = w.codes.decode(torch.float32).double().numpy()
        assert not np.allclose(decoded, dense[name].double().numpy())
        check_layer(rows[key], decoded, site.method.delta(site.layer, site.p).detach().double().numpy())


def test_w_is_rounded_as_training_read_it(base: Path, tmp_path: Path) -> None:
    adapter_of(base, tmp_path / "adapter")
    own = json.loads((tmp_path / "adapter" / "loraloom.json").read_text())
    own["trained_on"] = {"dtype": "bfloat16"}
    (tmp_path / "adapter" / "loraloom.json").write_text(json.dumps(own))
    tensors = load_file(base / "model.safetensors")
    for name, row in by_name(inspection.inspect(tmp_path / "adapter", offline=True)).items():
        w = tensors[f"{name}.weight"]
        seen = float(w.bfloat16().double().norm())
        assert row["norm_W"] == pytest.approx(seen, rel=1e-9)
        assert seen != pytest.approx(float(w.double().norm()), rel=1e-7)


def test_what_is_trained_whole_and_a_tied_head_are_looked_at(base: Path, tmp_path: Path) -> None:
    targets = ["q_proj", "embed_tokens", "lm_head"]
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=targets)
    rows = by_name(inspection.inspect(adapter, offline=True))
    before = weights(base)["model.embed_tokens.weight"]
    for name, w in (("model.embed_tokens", before.T), ("lm_head", before)):
        assert rows[name]["norm_W"] == pytest.approx(np.linalg.norm(w), rel=1e-5)
        assert rows[name]["shape"] == list(w.shape)
    saved = adapter_of(base, tmp_path / "saved", target_modules=["q_proj"], modules_to_save=["lm_head"])
    rows = by_name(inspection.inspect(saved, offline=True))
    own = load_file(saved / "adapter_model.safetensors")["base_model.model.lm_head.weight"].double().numpy()
    check_layer(rows["lm_head"], before, own - before)


# ---- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path) -> tuple[Run, Run]:
    folder = tmp_path_factory.mktemp("runs")
    few = {"train__max_steps": 4, "eval__every": 4, "target_modules": ["q_proj", "v_proj"]}
    one = run_tiny(model_folder, data_file, folder / "one", **few)
    return one, run_tiny(model_folder, data_file, folder / "two", r=8, train__seed=1, **few)


def test_the_command_writes_a_page_its_figures_and_the_runs_report(
    runs: tuple[Run, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], no_sockets: None
) -> None:
    one, two = runs
    out = tmp_path / "out"
    assert cli(["inspect", str(one.path), str(two.path), "-o", str(out), "--offline"]) == 0
    said = capsys.readouterr().out
    for words in (
        "every layer learnt",
        "q_proj",
        "v_proj",
        "amplification",
        "φ(1, 1)",
        "intruder dimensions",
    ):
        assert words in said
    names = {path.name for path in out.iterdir()}
    figures_made = {"spectra", "by-layer", *(f"phi-{side}-layer-1" for side in "AB")}
    assert names == {"inspect.html", "analysis.json"} | {
        f"{name}.{end}" for name in figures_made for end in ("svg", "png")
    }
    page = (out / "inspect.html").read_text()
    assert "one beside two" in page
    assert page.count("<figure") == 4
    assert "http" not in page.replace("http-equiv", "")
    assert "#a1b2" not in page  # every colour is the page's
    assert (out / "phi-A-layer-1.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "#a1b2" not in (out / "spectra.svg").read_text()
    kept = json.loads((out / "analysis.json").read_text())
    assert kept == json.loads((one.path / "analysis.json").read_text())
    report = (one.path / "report.html").read_text()
    assert "What the updates are made of" in report
    assert "What the updates are made of" not in (two.path / "report.html").read_text()


def test_json_has_every_number(runs: tuple[Run, Run], capsys: pytest.CaptureFixture[str]) -> None:
    one, two = runs
    assert (
        cli(["inspect", str(one.adapter_path), str(two.path), "--json", "--layer", "all", "--offline"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == len(found["comparison"]["layers"]) == 4
    for row in found["layers"]:
        assert len(row["singular_values"]) == row["rank"] <= 4
        assert {
            "norm",
            "norm_W",
            "ratio",
            "projections",
            "amplification",
            "intruders",
            "rounding",
        } <= row.keys()
    for pair in found["comparison"]["layers"]:
        phi = np.array(pair["sides"]["B"]["phi"])
        assert phi.shape == (4, 8)
        assert phi.min() >= 0
        assert phi.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layer", "first"], "--layer is 'first'"),
        (["--epsilon", "0"], "epsilon is 0.0"),
        (["--k", "0"], "k is 0"),
    ],
)
def test_wrong_options_are_told(
    arguments: list[str], words: str, runs: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["inspect", str(runs[0].path), *arguments, "--offline"]) == 2
    assert words in capsys.readouterr().err


def test_what_is_no_adapter_is_told(
    runs: tuple[Run, Run], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["inspect", str(base)]) == 2
    assert "neither a run nor an adapter" in capsys.readouterr().err
    assert cli(["inspect", str(runs[0].path.parent / "on")]) == 2
    assert "one" in capsys.readouterr().err


def test_a_page_shows_a_layer_that_died_and_names_with_markup(runs: tuple[Run, Run], tmp_path: Path) -> None:
    found = inspection.inspect(runs[0].path, offline=True)
    row = found["layers"][0]
    for key in ("singular_values", "ratio", "effective_rank", "amplification", "projections", "rounding"):
        row.pop(key)
    row |= {"state": "zero: B is zero", "norm": 0.0}
    found["adapter"]["name"] = "<b>&$x$"
    found["checks"] = inspection.checks(found["layers"], merges=True)
    inspection.write_page(found, tmp_path)
    page = (tmp_path / "inspect.html").read_text()
    assert "look at this" in page
    assert 'class="dead"' in page
    assert "<b>&$x$" not in page
    assert "&lt;b&gt;&amp;$x$" in page


def test_the_page_without_matplotlib_says_what_to_install(
    runs: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = inspection.inspect(runs[0].path, offline=True)
    with pytest.raises(UserError, match="matplotlib"):
        inspection.write_page(found, tmp_path)
    assert not list(tmp_path.glob("inspect.html"))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 64, 100, 576, 1024])
def test_ticks_are_few_and_end_near_the_last(count: int) -> None:
    made = figures.ticks(count)
    assert made[0] == 1
    assert made == sorted(set(made))
    assert len(made) <= 8
    assert made[-1] > count / 2 - 1


# ---- memory -------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
import torch
torch.set_num_threads(1)
from loraloom import inspection

def anonymous():
    text = open("/proc/self/status").read()
    return int(text.split("RssAnon:")[1].split()[0]) << 10

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

small, large = sys.argv[1:3]
inspection.inspect(small + "-adapter", offline=True)  # what is imported and kept for good
before, peak, done = anonymous(), 0, False
thread = threading.Thread(target=watch)
thread.start()
found = inspection.inspect(large + "-adapter", offline=True)
done = True
thread.join()
print(len(found["layers"]), peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read as Linux tells it")
def test_the_peak_is_some_matrices_and_not_the_model(tmp_path: Path) -> None:
    up = {"shard": 24 << 20, "targets": ["up_proj"]}
    small, large = (deep_folder(tmp_path / str(n), n, **up) for n in (1, 44))
    size = sum(path.stat().st_size for path in Path(large).glob("*.safetensors"))
    assert size > 180 << 20
    command = [sys.executable, "-c", MEASURE, small, large]
    layers, grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(layers) == 44
    assert int(grown) < 72 << 20  # numbers in float64 go by 8 MB at a time; a matrix is 1.5 MB in float32


@pytest.mark.slow
def test_on_the_real_model(real_model: Path, tmp_path: Path) -> None:
    """One layer's numbers by numpy, on weights that are no noise."""
    loaded = load_model(ModelConfig(id=str(real_model), dtype="bfloat16", device="cpu"), progress=False)
    adapters = attach(loaded.model, r=4, target_modules=["v_proj"], layers="3,17")
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=gen)
    save_adapter(adapters, tmp_path / "adapter", base_model=str(real_model))
    found = inspection.inspect(tmp_path / "adapter", offline=True)
    before = load_file(real_model / "model.safetensors")
    assert [row["number"] for row in found["layers"]] == [3, 17]
    for row in found["layers"]:
        site = adapters.adapters["default"].sites[row["name"]]
        w = before[f"{row['name']}.weight"].double().numpy()
        check_layer(row, w, site.method.delta(site.layer, site.p).detach().double().numpy())
