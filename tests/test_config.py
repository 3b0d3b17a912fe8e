"""The settings: where each comes from, what is refused and how, and that none of them is dead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_labels
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import make_data, make_model, make_shop, run_tiny

from loraloom import classifying
from loraloom.compiling import Compiled
from loraloom.config import (
    RunConfig,
    describe,
    flatten,
    parse_setting,
    resolve,
    resolve_alpha,
    to_yaml,
    with_values,
)
from loraloom.errors import UserError
from loraloom.quant import Scales8, Weight4
from loraloom.recompute import Recomputed
from loraloom.rundir import Run
from loraloom.workshop import Workshop

pytestmark = pytest.mark.usefixtures("quick")

THREE: dict[str, Any] = {"model": "m", "data": "d.jsonl", "output": "out"}
GOLDEN = """
model.id model.revision model.dtype model.device model.attention model.allow_pickle
model.quantize model.fp8 model.double_quant model.quant_block
data.train data.eval data.format data.map data.labels data.prompt data.system data.loss_on data.max_length data.too_long
data.max_lost data.packing data.encoding data.limit data.duplicates
output task method r alpha dropout target_modules layers rank_pattern alpha_pattern bias modules_to_save
train.epochs train.max_steps train.learning_rate train.schedule train.warmup train.batch_size train.batch_tokens
train.micro_tokens train.optimizer train.paged train.weight_decay train.betas train.momentum train.max_grad_norm
train.recompute train.fast train.compile train.graphs train.seed train.save_every train.save_minutes train.keep
train.early_stop
eval.every eval.prompts eval.max_new_tokens eval.best
"""
NAMES = GOLDEN.split()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---- sources and origins ------------------------------------------------------------------------------------


def test_no_setting_comes_or_goes_by_itself() -> None:
    assert [name for name, _, _ in describe()] == NAMES
    for name, default, text in describe():
        assert text, f"{name} has no description"
        assert "\n" not in default


def test_three_lines_are_enough_and_short_forms_are_written_out(tmp_path: Path) -> None:
    config, origins = resolve(write(tmp_path / "a.yaml", "model: m\ndata: d.jsonl\noutput: out\n"))
    assert config.model.id == "m"
    assert [source.path for source in config.data.train] == ["d.jsonl"]
    assert config.method == {"name": "lora"}
    assert origins["model.id"] == origins["data.train"] == origins["output"] == "file"
    assert set(origins.values()) == {"file", "default"}
    assert set(origins) == set(flatten(config.model_dump()))
    assert config == resolve(None, THREE)[0]


def test_flags_win_over_the_file_and_only_where_they_speak(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.yaml",
        "model: {id: m, dtype: bfloat16}\ndata: {train: d.jsonl, eval: 9}\noutput: out\nr: 4\ntrain: {epochs: 2}\n",
    )
    flags = {"model": "other", "data": "e.jsonl", "train.seed": 5, "method": "rslora", "r": 8}
    config, origins = resolve(file, flags)
    assert config.model.id == "other"
    assert config.model.dtype == "bfloat16"  # the flag named the model, not its format
    assert config.data.train[0].path == "e.jsonl"
    assert config.data.eval == 9
    assert (config.r, config.train.seed, config.train.epochs) == (8, 5, 2)
    expected = {
        "model.id": "flag",
        "model.dtype": "file",
        "data.eval": "file",
        "data.train": "flag",
        "r": "flag",
    }
    expected |= {"train.seed": "flag", "train.epochs": "file", "train.keep": "default", "method.name": "flag"}
    assert {name: origins[name] for name in expected} == expected


def test_a_key_below_a_free_mapping_keeps_its_dots_and_its_origin() -> None:
    flags = {"data.map.prompt": "question", "rank_pattern.layers.0.mlp": 8, "alpha_pattern": {"q_proj": 3.0}}
    config, origins = resolve(None, THREE | flags)
    assert config.data.map == {"prompt": "question"}
    assert config.rank_pattern == {"layers.0.mlp": 8}
    assert origins["data.map"] == origins["rank_pattern"] == origins["alpha_pattern"] == "flag"


def test_what_was_given_is_what_is_stored(tmp_path: Path) -> None:
    flags = {"data.map.prompt": "question", "rank_pattern.layers.0.mlp": 8, "train.betas": [0.5, 0.6]}
    config, origins = resolve(None, THREE | flags)
    run = Run.create(tmp_path / "run", config, origins, ["loraloom"])
    given, _ = resolve(run.path / "config.yaml")
    assert given == config == resolve(run.path / "config.resolved.yaml")[0]
    stored = yaml.safe_load((run.path / "config.yaml").read_text())
    assert stored["data"].keys() == {"train", "map"}


def test_several_sources(tmp_path: Path) -> None:
    text = "model: m\noutput: o\ndata:\n  train:\n    - a.jsonl\n"
    text += "    - {path: hf:org/set, split: 'train[:9]', repeat: 2}\n"
    config, _ = resolve(write(tmp_path / "a.yaml", text))
    assert [(s.path, s.split, s.repeat) for s in config.data.train] == [
        ("a.jsonl", "train", 1),
        ("hf:org/set", "train[:9]", 2),
    ]


# ---- what is refused ----------------------------------------------------------------------------------------


def refused(file: Path | None = None, settings: dict[str, Any] | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        resolve(file, settings)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("epochs", "train.epochs"),
        ("train.epoch", "train.epochs"),
        ("train.lr", "train.learning_rate"),
        ("modle", "model"),
        ("model.name", "id"),
        ("data.template", None),
        ("rank", "did you mean r?"),
        ("eval.prompt", "eval.prompts"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, hint: str | None) -> None:
    error = refused(None, THREE | {key: 1})
    assert f"unknown key {key}" in str(error)
    if hint is not None:
        assert hint in (error.hint or "")


def test_every_mistake_of_a_file_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.yaml",
        "model: m\ndata: d\noutput: out\nr: zero\ntrain:\n  epoch: 3\n  keep: -1\n  schedule: cosin\nalpha: 3q\n",
    )
    error = refused(file)
    assert error.message == "the settings do not fit"
    told = "\n".join(error.details)
    assert f"{file} line 4: r is 'zero'" in told
    assert f"{file} line 6: unknown key train.epoch" in told
    assert f"{file} line 7: train.keep is -1" in told
    assert f"{file} line 8: train.schedule is 'cosin'" in told
    assert "train.epochs" in (error.hint or "")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: m\nmodel: n\n", "line 2: model"),
        ("model: m\ntrain:\n  seed: 1\n  keep: 3\n  seed: 2\n", "line 5: train.seed"),
        ("model: [1\n", "is not YAML"),
        ("- a\n- b\n", "must hold key: value lines"),
        ("", "model is not set"),
        ("model: m\ndata: d\n", "output is not set"),
        ("model: m\ndata: d\noutput: o\ntrain: {batch_size: 2, batch_tokens: 9}\n", "set one of them"),
        ("model: m\ndata: d\noutput: o\ntrain: 3\n", "train is 3"),
        ("model: m\ndata: d\noutput: o\ntrain: {epochs: .inf}\n", "train.epochs is inf"),
        ("model: m\ndata: d\noutput: o\ntrain: {learning_rate: .nan}\n", "train.learning_rate is nan"),
        ("model: m\ndata: d\noutput: o\ndropout: 1\n", "dropout is 1"),
        ("model: m\ndata: d\noutput: o\nalpha: 2q\n", "alpha is '2q'"),
        ("model: m\ndata: d\noutput: o\nalpha: 0r\n", "alpha is '0r'"),
        ("model: m\ndata: d\noutput: o\nr: 2.5\n", "r is 2.5"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, told: str) -> None:
    file = write(tmp_path / "a.yaml", text)
    assert told in str(refused(file))


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert "there is no configuration file" in refused(tmp_path / "no.yaml").message
    assert "there is no configuration file" in refused(tmp_path).message
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00model")
    assert "is not YAML" in refused(tmp_path / "b.yaml").message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.epochs=3", ("train.epochs", 3)),
        ("data.eval=held.jsonl", ("data.eval", "held.jsonl")),
        ("eval.prompts=[a, b]", ("eval.prompts", ["a", "b"])),
        ("train.max_grad_norm=null", ("train.max_grad_norm", None)),
        ("layers=", ("layers", None)),
        (" r = 8", ("r", 8)),
        ("target_modules=.*\\.q", ("target_modules", ".*\\.q")),
    ],
)
def test_a_setting_of_a_flag(text: str, expected: tuple[str, Any]) -> None:
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["train.epochs", "=3", "data.map={a", "eval.prompts=[a"])
def test_a_setting_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match="--set "):
        parse_setting(text)


@pytest.mark.parametrize("text", ["1e-4", "0.0001", "1E-4", 1e-4])
def test_a_rate_that_yaml_takes_for_text(text: Any) -> None:
    assert resolve(None, THREE | {"train.learning_rate": text})[0].train.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("alpha", "number"),
    [
        ("2r", 32),
        ("r", 16),
        ("0.5r", 8),
        ("2*r", 32),
        (" 2 r ", 32),
        ("24", 24),
        (24, 24),
        (0.5, 0.5),
        ("1e1", 10),
    ],
)
def test_alpha_as_a_number_or_a_multiple_of_the_rank(alpha: Any, number: float) -> None:
    assert resolve_alpha(alpha, 16) == number
    assert resolve(None, THREE | {"alpha": alpha})[0].alpha == alpha


# ---- there and back -----------------------------------------------------------------------------------------

texts = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12
) | st.sampled_from(
    [
        "no",
        "1e3",
        "null",
        "~",
        "a: b",
        "- x",
        "# x",
        "'",
        '"',
        " x ",
        "2026-01-01",
        "{",
        "two\nlines\n\n",
        "\ttab",
        "é",
        "\u2028",
    ]
)
positive = st.integers(1, 10**6)
shares = st.floats(0, 1, exclude_max=True)
changed = st.fixed_dictionaries(
    {},
    optional={
        "data.system": texts,
        "data.map": st.dictionaries(texts, texts, max_size=3),
        "data.eval": texts | shares,
        "rank_pattern": st.dictionaries(texts, positive, max_size=3),
        "target_modules": texts | st.lists(texts, max_size=3),
        "r": positive,
        "dropout": shares,
        "alpha": st.floats(1e-6, 1e6),
        "eval.prompts": st.lists(texts, max_size=3),
        "train.max_steps": st.none() | positive,
        "train.learning_rate": st.just("auto") | st.floats(1e-12, 1),
        "train.betas": st.tuples(shares, shares),
        "train.seed": st.integers(-(2**40), 2**40),
    },
)


@settings(deadline=None)
@given(changed)
def test_settings_written_as_yaml_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, values: Any
) -> None:
    config, origins = resolve(None, THREE | values)
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(to_yaml(config, origins), encoding="utf-8")
    assert resolve(file)[0] == config
    file.write_text(to_yaml(config), encoding="utf-8")
    assert resolve(file)[0] == config


def test_origins_stand_behind_the_values() -> None:
    config, origins = resolve(None, THREE | {"train.seed": 4})
    lines = to_yaml(with_values(config, {"eval.every": 7}), origins | {"eval.every": "auto"}).splitlines()
    assert "  seed: 4  # flag" in lines
    assert "  keep: 2  # default" in lines
    assert "  every: 7  # auto" in lines


def test_the_schema_is_frozen() -> None:
    config, _ = resolve(None, THREE)
    with pytest.raises(ValueError, match="frozen"):
        config.r = 3  # type: ignore[misc]


# ---- no setting is dead ---------------------------------------------------------------------------------------


def sites(shop: Workshop) -> dict[str, Any]:
    return shop.adapters.adapters["default"].sites


def ids_of(shop: Workshop) -> set[tuple[int, ...]]:
    return {tuple(example.ids) for side in (shop.train, shop.eval) for example in side}


def group(shop: Workshop) -> dict[str, Any]:
    return shop.optimizer.param_groups[0]


def text_of(shop: Workshop, i: int = 0) -> str:
    return str(shop.tokenizer.decode(shop.train[i].ids))


Seen = Callable[[Workshop, Workshop], bool]  # of a workshop with the setting, and one without it


def values(shop: Workshop, what: str, part: str = "") -> set[Any]:
    """r, alpha or dropout of the adapted layers whose name has `part`."""
    return {getattr(site.method, what) for name, site in sites(shop).items() if part in name}


def first_a(shop: Workshop) -> torch.Tensor:
    return next(iter(sites(shop).values())).p["A"]


def trained(shop: Workshop) -> list[str]:
    return [name for name, _ in shop.adapters.named_parameters()]


def first_weight(shop: Workshop) -> Any:
    return next(iter(sites(shop).values())).layer.module.weight


def forward_of(shop: Workshop) -> Any:
    """What runs in place of the first decoder layer's own forward."""
    return vars(shop.model.model.layers[0]).get("forward")


def codes(shop: Workshop) -> tuple[Any, ...]:
    """Table, whether scales are quantised, and block of a base in 4 bits; nothing of a dense one."""
    w = first_weight(shop)
    return (
        (w.codes.table, isinstance(w.codes.scales, Scales8), w.codes.block) if isinstance(w, Weight4) else ()
    )


def rates_of(shop: Workshop) -> set[float]:
    return {one["lr"] for one in shop.optimizer.param_groups}


BUILT: dict[str, tuple[Any, Seen]] = {
    "model.dtype": ("bfloat16", lambda shop, _: next(shop.model.parameters()).dtype == torch.bfloat16),
    "model.device": ("cpu", lambda shop, _: shop.loaded.device == torch.device("cpu")),
    "model.attention": ("eager", lambda shop, _: shop.model.config._attn_implementation == "eager"),
    "model.quantize": ("fp4", lambda shop, _: codes(shop)[:1] == ("fp4",)),
    "model.fp8": (True, lambda shop, _: getattr(first_weight(shop), "fp8", False)),
    "model.double_quant": (False, lambda shop, _: codes(shop)[1:2] == (False,)),
    "model.quant_block": (128, lambda shop, _: codes(shop)[2:] == (128,)),
    "data.eval": (7, lambda shop, _: len(shop.eval) == 7),
    "data.prompt": ("plain", lambda shop, _: "<|im_start|>" not in text_of(shop)),
    "data.system": ("Be brief.", lambda shop, _: "Be brief." in text_of(shop)),
    "data.loss_on": ("all", lambda shop, other: shop.train.targets.sum() > 2 * other.train.targets.sum()),
    "data.packing": (False, lambda shop, _: not shop.packing),
    "data.limit": (9, lambda shop, _: len(shop.train) + len(shop.eval) == 9),
    "method": ({"name": "loraplus", "lr_ratio": 3}, lambda shop, _: rates_of(shop) == {5e-3, 5e-3 * 3}),
    "r": (6, lambda shop, _: first_a(shop).shape[0] == 6),
    "alpha": ("3r", lambda shop, _: values(shop, "alpha") == {12}),
    "dropout": (0.25, lambda shop, _: values(shop, "dropout") == {0.25}),
    "target_modules": (["q"], lambda shop, _: all(name.endswith("q_proj") for name in sites(shop))),
    "layers": ("1", lambda shop, _: all(".layers.1." in name for name in sites(shop))),
    "rank_pattern": ({"q_proj": 2}, lambda shop, _: values(shop, "r", "q_proj") == {2}),
    "alpha_pattern": ({"q_proj": 5.0}, lambda shop, _: values(shop, "alpha", "q_proj") == {5.0}),
    "bias": ("all", lambda shop, _: any(name.endswith("q_proj.bias") for name in trained(shop))),
    "modules_to_save": (["norm"], lambda shop, _: any(n.endswith("model.norm.weight") for n in trained(shop))),
    "train.epochs": (3, lambda shop, _: len(shop.plan) == 15),
    "train.max_steps": (7, lambda shop, _: len(shop.plan) == 7),
    "train.learning_rate": (7e-4, lambda shop, _: rates_of(shop) == {7e-4}),
    "train.batch_size": (3, lambda shop, _: len(shop.plan[0]) == 3),
    "train.micro_tokens": (96, lambda shop, _: shop.micro_tokens == 96),
    "train.optimizer": ("sgd", lambda shop, _: isinstance(shop.optimizer, torch.optim.SGD)),
    "train.weight_decay": (0.4, lambda shop, _: group(shop)["weight_decay"] == 0.4),
    "train.betas": ([0.7, 0.8], lambda shop, _: group(shop)["betas"] == (0.7, 0.8)),
    "train.recompute": ("full", lambda shop, _: isinstance(forward_of(shop), Recomputed)),
    "train.fast": (True, lambda shop, _: len(shop.adapters.fast) == 2),
    "train.compile": (True, lambda shop, _: isinstance(forward_of(shop), Compiled)),
    "train.seed": (9, lambda shop, other: shop.plan[0] != other.plan[0]
                   and not torch.equal(first_a(shop), first_a(other))),
    "eval.every": (3, lambda shop, _: shop.eval_every == 3),
}  # fmt: skip
BESIDES: dict[str, dict[str, Any]] = {
    "train.epochs": {"train.max_steps": None},
    "bias": {"model.id": "with biases"},
    "model.fp8": {"model.quantize": "nf4"},
    "train.fast": {"model.attention": "varlen"},
    "model.double_quant": {"model.quantize": "nf4"},
    "model.quant_block": {"model.quantize": "nf4"},
}


@pytest.fixture(scope="module")
def plain_shop(model_folder: Path, data_file: Path) -> Workshop:
    return make_shop(model_folder, data_file)


@pytest.mark.parametrize("name", BUILT)
def test_a_setting_is_seen_in_what_is_built(
    name: str, plain_shop: Workshop, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    value, seen = BUILT[name]
    if name == "train.compile" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler here")
    if name == "bias":
        model_folder = make_model(tmp_path / "biased", attention_bias=True)
        plain_shop = make_shop(model_folder, data_file)
    besides = {key: val for key, val in BESIDES.get(name, {}).items() if key != "model.id"}
    assert not seen(plain_shop, plain_shop) or name in ("model.device",), "the case cannot tell"
    assert seen(make_shop(model_folder, data_file, **besides, **{name: value}), plain_shop)


def test_model_id_revision_and_pickle(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such-model"):
        make_shop(tmp_path / "no-such-model", data_file)
    with pytest.raises(UserError, match=r"model\.revision"):
        make_shop(model_folder, data_file, model__revision="v1")
    folder = make_model(tmp_path / "pickled")
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"\.bin"):
        make_shop(folder, data_file)
    assert make_shop(folder, data_file, model__allow_pickle=True).model is not None


def test_settings_of_the_data(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"what is {i}", "completion": "two " * (1 + 20 * (i == 3))} for i in range(24)]
    rows.append(rows[5])
    data = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    plain = make_shop(model_folder, data, data__eval=0)
    assert len(plain.train) == 24  # data.duplicates drops one
    assert len(make_shop(model_folder, data, data__eval=0, data__duplicates="keep").train) == 25
    short = {"data__eval": 0, "data__max_length": 40}
    dropped = make_shop(model_folder, data, **short)
    assert len(dropped.train) == 23  # data.max_length, data.too_long
    assert int(dropped.train.lengths.max()) < 40
    cut = make_shop(model_folder, data, **short, data__too_long="truncate")
    assert (len(cut.train), int(cut.train.lengths.max())) == (24, 40)
    with pytest.raises(UserError, match=r"too_long|max_length|longer"):
        make_shop(model_folder, data, **short, data__too_long="error")
    with pytest.raises(UserError, match="max_lost") as caught:
        make_shop(model_folder, data, **short, data__max_lost=0.01)
    assert caught.value.exit_code == 3
    two = [{"path": str(data), "repeat": 2}]
    assert len(make_shop(model_folder, data, data__eval=0, **{"data.train": two}).train) == 48


def test_what_only_a_gpu_can_do_is_refused_on_a_cpu(model_folder: Path, data_file: Path) -> None:
    with pytest.raises(UserError, match=r"train\.paged"):
        make_shop(model_folder, data_file, train__paged=True)
    with pytest.raises(UserError, match=r"train\.micro_tokens=fit needs a GPU"):
        make_shop(model_folder, data_file, train__micro_tokens="fit")
    with pytest.raises(UserError, match=r"train\.graphs=true: this run is on cpu"):
        make_shop(model_folder, data_file, model__device="cpu", train__graphs=True)


def test_map_format_and_encoding(model_folder: Path, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"q": f"what is {i}", "a": "two", "text": "zwei"}) + "\n" for i in range(8))
    data = write(tmp_path / "a.jsonl", rows)
    mapped = make_shop(model_folder, data, data__eval=0, data__map={"prompt": "q", "completion": "a"})
    assert "what is" in text_of(mapped)
    texts = make_shop(model_folder, data, data__eval=0, data__format="text")
    assert "zwei" in text_of(texts)
    assert "what" not in text_of(texts)
    (tmp_path / "b.csv").write_bytes("prompt,completion\nwas ist süß,fünf\nund das,zwei\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"(?i)utf-8") as caught:
        make_shop(model_folder, tmp_path / "b.csv", data__eval=0)
    assert caught.value.exit_code == 3
    shop = make_shop(model_folder, tmp_path / "b.csv", data__eval=0, data__encoding="latin-1")
    assert any("süß" in text_of(shop, i) for i in range(2))


def test_settings_of_the_loop(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    def run(name: str, **changes: Any) -> Any:
        return run_tiny(model_folder, data_file, tmp_path / name, **{"train__max_steps": 4, **changes})

    def rates(found: Any) -> list[float]:
        return [record["lr"] for record in found.metrics("train")]

    plain = run("plain")
    assert plain.path == tmp_path / "plain"  # output
    assert rates(run("schedule", train__schedule="constant", train__warmup=0)) == [5e-3] * 4
    assert rates(run("warmup", train__warmup=4)) == pytest.approx([1.25e-3, 2.5e-3, 3.75e-3, 5e-3])
    seen: list[int] = []
    run("tokens", train__batch_size=None, train__batch_tokens=50, listen=lambda kind, record: seen.append(
        record["tokens"]) if kind == "step" else None)  # fmt: skip
    assert max(seen) <= 50
    finals = {
        name: [
            record["loss"] for record in run(name, train__optimizer="sgd", **{key: value}).metrics("eval")
        ][-1]
        for name, key, value in (
            ("sgd", "train__momentum", 0.9),
            ("momentum", "train__momentum", 0.1),
            ("clip", "train__max_grad_norm", 1e-6),
        )
    }
    assert len(set(finals.values())) == 3
    assert finals["clip"] == pytest.approx(plain.state["base_loss"], rel=1e-4)  # hardly moved
    kept = run("kept", train__save_every=1, train__keep=3)
    assert [step for step, _ in kept.checkpoints()] == [2, 3, 4]
    quick = run("quick", train__save_minutes=1e-9, train__keep=9)
    assert [step for step, _ in quick.checkpoints()] == [1, 2, 3, 4]
    assert [step for step, _ in plain.checkpoints()] == [4]
    stopped = run(
        "stopped", train__max_steps=20, train__early_stop=1, train__learning_rate=0.5, eval__every=1
    )
    assert stopped.state["status"] == "stopped_early"
    prompts = run("prompts", eval__prompts=["what is 2", "and 3"], eval__max_new_tokens=2)
    assert {sample["prompt"] for sample in prompts.samples()} == {"what is 2", "and 3"}
    assert len(run("every", eval__every=1).metrics("eval")) == 5


def test_settings_of_labels(tmp_path: Path) -> None:
    model = tiny_labels.make_encoder(tmp_path / "bert")
    data = tiny_labels.make_rows(
        tmp_path / "d.jsonl", [{"text": f"w{i} w{i % 7}", "label": i % 2} for i in range(40)]
    )

    def shop(**changes: Any) -> Any:
        chosen = tiny_labels.settings(model, data, tmp_path / "run", **{"data__eval": 8} | changes)
        return classifying.build(resolve(None, chosen)[0], offline=True, progress=False)

    assert shop().model.config.num_labels == 2
    assert shop().config.eval.best == "accuracy"
    assert shop(data__labels="numbers").model.config.num_labels == 1
    assert shop(eval__best="matthews").config.eval.best == "matthews"
    with pytest.raises(UserError, match="set task=classification"):
        resolve(None, tiny_labels.settings(model, data, tmp_path / "run", task="causal", eval__best="f1"))


SEEN_ELSEWHERE = {
    "test_model_id_revision_and_pickle": {"model.id", "model.revision", "model.allow_pickle"},
    "test_what_only_a_gpu_can_do_is_refused_on_a_cpu": {"train.paged", "train.graphs"},
    "test_settings_of_the_data": {
        "data.duplicates",
        "data.max_length",
        "data.too_long",
        "data.max_lost",
        "data.train",
    },
    "test_map_format_and_encoding": {"data.map", "data.format", "data.encoding"},
    "test_settings_of_the_loop": {
        "output",
        "train.schedule",
        "train.warmup",
        "train.batch_tokens",
        "train.momentum",
        "train.max_grad_norm",
        "train.save_every",
        "train.save_minutes",
        "train.keep",
        "train.early_stop",
        "eval.prompts",
        "eval.max_new_tokens",
    },
    "test_settings_of_labels": {"task", "data.labels", "eval.best"},
}


def test_every_setting_has_a_test_that_sees_it() -> None:
    covered = set(BUILT).union(*SEEN_ELSEWHERE.values())
    assert covered == set(NAMES)
    assert all(name in globals() for name in SEEN_ELSEWHERE)


def test_auto_is_decided_and_stored_with_its_origin(model_folder: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "d.jsonl", rows=40)
    auto = {"train__batch_size": None, "train__learning_rate": "auto", "eval__every": "auto"}
    run = run_tiny(model_folder, data, tmp_path / "run", **auto, train__max_steps=3)
    names = ("train.learning_rate", "train.micro_tokens", "eval.every", "train.batch_size")
    assert {run.origins[name] for name in names} == {"auto"}
    config = RunConfig.model_validate(run.config.model_dump())
    assert config.train.learning_rate == 2e-4  # LoRA's
    assert config.eval.every == 1
    assert config.train.batch_size == 16
    assert config.train.micro_tokens != "auto"
