"""Classifiers: what trains, that PEFT computes the same, that a step can be split, stopped and resumed."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import PeftModelForSequenceClassification
from tiny_labels import CONFIGS, LENGTH, make_encoder, make_rows, rows, run_tiny, settings
from tiny_run import adapter_bytes, timeless
from torch.nn.functional import cross_entropy

from loraloom import api, classifying, use
from loraloom.adapt import Adapters
from loraloom.adapter import AdapterSpec
from loraloom.classifier import head_names, logits_of, longest_input, row_losses
from loraloom.cli import run as command
from loraloom.config import resolve
from loraloom.data import LabelledExample, Labels
from loraloom.errors import NonFinite, UserError
from loraloom.evaluate_labels import constant
from loraloom.inspection import inspect
from loraloom.padded import pad_rows
from loraloom.skeleton import CLASSIFIER, meta_model
from loraloom.step import train_step
from loraloom.use import find_target, load_found

pytestmark = pytest.mark.usefixtures("quick")
PLAIN = ["bert", "roberta", "deberta", "llama"]


@pytest.fixture(scope="module", params=PLAIN)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_rows(tmp_path / "rows.jsonl")


def shop_of(model: Path, data: Path, **changes: Any) -> Any:
    config, _ = resolve(None, settings(model, data, Path("unused"), **changes))
    return classifying.build(config, offline=True, progress=False)


def padded_logits(model: Any, examples: Any) -> torch.Tensor:
    """Of all examples in one padded batch, in their order."""
    [batch] = pad_rows(examples, micro_tokens=10**6, pad_id=0)
    found = torch.empty(len(examples), model.config.num_labels)
    found[torch.tensor(batch.members)] = logits_of(model, batch)
    return found


# ==== what trains ============================================================================================


@pytest.mark.parametrize(
    ("config", "r", "entries", "count"),
    [
        (tf.RobertaConfig(vocab_size=50265, max_position_embeddings=514), 8, ["q", "v"], 294_912),
        (
            tf.RobertaConfig(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
            ),
            8,
            ["q", "v"],
            786_432,
        ),
        (
            tf.DebertaV2Config(
                hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144
            ),
            16,
            ["q", "v"],
            4_718_592,
        ),
    ],
    ids=["RoBERTa base", "RoBERTa large", "DeBERTa XXL"],
)
def test_counts_are_those_of_the_lora_paper(config: Any, r: int, entries: list[str], count: int) -> None:
    """Table 2 of the paper says 0.3 M, 0.8 M and 4.7 M; its head comes on top."""
    model = meta_model(config, dtype=torch.float32, attention="eager", factory=CLASSIFIER)
    heads = head_names(model)
    adapters = Adapters(model, device="meta")
    adapter = adapters.add("a", AdapterSpec(r=r, target_modules=entries, modules_to_save=heads))
    assert sum(p.numel() for site in adapter.sites.values() for p in site.trainable) == count
    whole = sum(p.numel() for _, p in adapters.overlaid("a"))
    assert whole == sum(p.numel() for name in heads for p in model.get_submodule(name).parameters())


HEADS = {
    "bert": ["classifier"],
    "roberta": ["classifier"],
    "deberta": ["pooler", "classifier"],
    "llama": ["score"],
}


def test_the_head_is_found_and_all_of_it_trains(each: Path, data: Path) -> None:
    shop = shop_of(each, data)
    assert shop.config.modules_to_save == HEADS[each.name]
    assert shop.decided["modules_to_save"] == HEADS[each.name]
    trained = {name.rpartition(".")[0].partition(".")[0] for name, _ in shop.adapters.overlaid("default")}
    assert trained == set(HEADS[each.name])
    assert not any(p.requires_grad for p in shop.model.parameters())


def test_a_head_is_drawn_by_the_seed_alone(bert: Path, data: Path) -> None:
    first = shop_of(bert, data)
    torch.randn(7)  # what was drawn before must not matter
    again, other = shop_of(bert, data), shop_of(bert, data, train__seed=1)
    weight = first.model.classifier.weight
    assert torch.equal(weight, again.model.classifier.weight)
    assert not torch.equal(weight, other.model.classifier.weight)
    assert 0.01 < float(weight.std()) < 0.04  # BERT's initializer_range is 0.02


def test_a_head_of_another_shape_is_drawn_anew(bert: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "three"
    tf.BertForSequenceClassification.from_pretrained(bert, num_labels=3).save_pretrained(folder)
    for file in bert.glob("tokenizer*"):
        shutil.copy(file, folder)
    assert shop_of(folder, data).model.classifier.weight.shape == (2, 32)


def test_a_head_that_fits_is_kept(bert: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    before = tf.BertForSequenceClassification.from_pretrained(bert, num_labels=2)
    before.save_pretrained(folder)
    for file in bert.glob("tokenizer*"):
        shutil.copy(file, folder)
    assert torch.equal(shop_of(folder, data).model.classifier.weight, before.classifier.weight)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (tf.BertConfig(), 512),
        (tf.RobertaConfig(max_position_embeddings=514), 512),
        (tf.DebertaV2Config(hidden_size=24, num_attention_heads=4, relative_attention=True), 512),
        (tf.DistilBertConfig(), 512),
    ],
)
def test_the_longest_input(config: Any, longest: int) -> None:
    config.num_hidden_layers = 1
    model = meta_model(config, dtype=torch.float32, attention="eager", factory=CLASSIFIER)
    assert longest_input(model, type("Tokenizer", (), {"model_max_length": 10**30})) == longest
    assert longest_input(model, type("Tokenizer", (), {"model_max_length": 100})) == 100


def test_the_longest_input_runs(each: Path, data: Path) -> None:
    shop = shop_of(each, data)
    limit = longest_input(shop.model, shop.tokenizer)
    assert limit == LENGTH
    examples = [LabelledExample([5] * limit, [], 0.0, "a")]
    assert padded_logits(shop.model, examples).isfinite().all()


# ==== the step ===============================================================================================


def test_the_loss_is_that_of_torch() -> None:
    logits = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 1, 2, 1, 0]).double()
    assert torch.equal(row_losses(logits, label), cross_entropy(logits, label.long(), reduction="none"))
    assert torch.allclose(row_losses(logits[:, :1], label), (logits[:, 0] - label) ** 2)


@pytest.mark.parametrize("kind", PLAIN)
def test_one_batch_of_eight_is_four_of_two(kind: str, tmp_path: Path, data: Path) -> None:
    shop = shop_of(make_encoder(tmp_path / kind, kind), data, dropout=0.1)
    shop.model.double()
    for parameter in shop.adapters.parameters():
        parameter.data = parameter.data.double()
    examples = [shop.train[i] for i in range(8)]

    def gradients(batches: Any) -> tuple[float, dict[str, torch.Tensor]]:
        loss = classifying.TASK.gradient(shop.model, shop.adapters, batches, 8, 3)  # type: ignore[misc]
        found = {name: p.grad.clone() for name, p in shop.adapters.named_parameters() if p.grad is not None}
        for p in shop.adapters.parameters():
            p.grad = None
        return float(loss), found

    whole = pad_rows(examples, micro_tokens=10**6, pad_id=0)
    parts = pad_rows(examples, micro_tokens=2 * max(len(e.ids) for e in examples), pad_id=0)
    assert len(whole) == 1
    assert len(parts) > 2
    (loss, grads), (again, others) = gradients(whole), gradients(parts)
    assert loss == pytest.approx(again, rel=1e-12)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-9, atol=1e-12)


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    micro=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_batches_hold_every_row_once(sizes: list[int], micro: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    ids = [torch.randint(4, 40, (size,), generator=gen).tolist() for size in sizes]
    examples = [LabelledExample(one, [], float(i), str(i)) for i, one in enumerate(ids)]
    batches = pad_rows(examples, micro_tokens=micro, pad_id=0)
    assert sorted(member for batch in batches for member in batch.members) == list(range(len(sizes)))
    for batch in batches:
        assert batch.ids.numel() <= micro or len(batch.rows) == 1
        assert batch.targets == len(batch.rows) == len(batch.spans)
        for b, one in enumerate(batch.alone()):
            example = examples[batch.members[b]]
            assert one.ids[0].tolist() == example.ids == batch.ids[b, : int(batch.mask[b].sum())].tolist()
            assert float(one.label) == example.label
            assert bool(one.mask.all())


def test_padding_changes_nothing(each: Path, data: Path) -> None:
    shop = shop_of(each, data)
    examples = [shop.train[i] for i in range(6)]
    with torch.no_grad():
        together = padded_logits(shop.model, examples)
        alone = torch.cat([padded_logits(shop.model, [example]) for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_rows_whose_loss_is_not_finite_are_named(bert: Path, data: Path) -> None:
    shop = shop_of(bert, data)
    examples = [shop.train[i] for i in range(4)]
    broken = LabelledExample([1], [], 0.0, "rows.jsonl:broken")
    assert all(1 not in example.ids for example in examples)
    with torch.no_grad():
        shop.model.get_input_embeddings().weight[1] = torch.nan
    batches = pad_rows([*examples, broken], micro_tokens=10**6, pad_id=0)
    with pytest.raises(NonFinite) as caught:
        train_step(
            shop.model,
            shop.adapters,
            shop.optimizer,
            batches,
            step=0,
            num_steps=2,
            max_norm=1.0,
            backward=classifying.TASK.gradient,  # type: ignore[arg-type]
            broken=classifying.TASK.broken,
        )
    assert caught.value.details == ["rows.jsonl:broken: its loss is not finite"]
    assert caught.value.weights_good


# ==== a run ==================================================================================================


@pytest.fixture(scope="module")
def finished(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of 60 steps on a rule that a tiny model learns."""
    folder = tmp_path_factory.mktemp("runs")
    data = make_rows(folder / "rows.jsonl", rows(260))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraloom.api.build_report", lambda run: None)
        return run_tiny(bert, data, folder / "run", train__max_steps=60, eval__every=10)


def test_a_rule_is_learnt_and_checked(finished: Any) -> None:
    assert finished.state["best"]["accuracy"] > 0.85
    assert finished.state["best"]["metric"] == "accuracy"
    assert all(check["ok"] for check in finished.checks()), finished.checks()
    names = {check["name"] for check in finished.checks()}
    assert {"classes", "beats the commonest class", "learnt", "adapter reads back"} <= names
    assert finished.read("data/manifest.json", {})["labels"] == ["bad", "good"]
    best = max(r["accuracy"] for r in finished.metrics("eval"))
    assert finished.state["best"]["accuracy"] == best


def test_inspect_reads_a_classifier(finished: Any) -> None:
    found = inspect(finished.path, offline=True)
    names = {layer["name"] for layer in found["layers"]}
    assert any(name.endswith("query") for name in names), found


def test_peft_gives_the_same_logits_and_gradients(each: Path, data: Path, tmp_path: Path) -> None:
    run = run_tiny(each, data, tmp_path / "run", train__max_steps=4)
    found = find_target(run.path)
    loaded, adapters = load_found(found, None, offline=True)
    assert adapters is not None
    base = tf.AutoModelForSequenceClassification.from_pretrained(each, **found.labels.settings())  # type: ignore[union-attr]
    base.config.pad_token_id = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModelForSequenceClassification.from_pretrained(base, run.adapter_path, is_trainable=True)
    theirs.eval()
    about = json.loads((run.adapter_path / "adapter_config.json").read_text())
    assert about["task_type"] == "SEQ_CLS"
    examples = use.held_labelled(found)[:8]
    [batch] = pad_rows(examples, micro_tokens=10**6, pad_id=0)
    inputs = batch.inputs if each.name == "bert" else {"input_ids": batch.ids, "attention_mask": batch.mask}
    ours_BC, theirs_BC = logits_of(loaded.model, batch), theirs(**inputs).logits
    torch.testing.assert_close(ours_BC, theirs_BC, rtol=1e-5, atol=1e-5)
    row_losses(ours_BC, batch.label).sum().backward()
    cross_entropy(theirs_BC, batch.label.long(), reduction="sum").backward()
    mine = {name.partition("|")[2]: p.grad for name, p in adapters.named_parameters()}
    compared = 0
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            own = (
                name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
            )
            own = own.replace(".lora_A.weight", "/A").replace(".lora_B.weight", "/B")
            torch.testing.assert_close(mine[own], p.grad, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared == len(mine)


@pytest.mark.parametrize("numbers", [False, True])
def test_stopping_and_resuming_changes_nothing(
    numbers: bool, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_rows(tmp_path / "rows.jsonl", rows(numbers=numbers))
    changes = {"train__save_every": 3, "dropout": 0.1}
    whole = run_tiny(bert, data, tmp_path / "whole", **changes)

    def stop(kind: str, record: Any) -> None:
        if kind == "step" and record["step"] == 7:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run_tiny(bert, data, tmp_path / "cut", listen=stop, **changes)
    again = api.resume(tmp_path / "cut", offline=True)
    assert adapter_bytes(again) == adapter_bytes(whole)
    assert timeless(again.metrics()) == timeless(whole.metrics())
    assert again.state["best"] == whole.state["best"]


def test_a_run_does_not_go_on_with_other_labels(bert: Path, tmp_path: Path) -> None:
    items = rows()
    data = make_rows(tmp_path / "rows.jsonl", items)
    run = run_tiny(bert, data, tmp_path / "run", train__save_every=3)
    run.update(status="interrupted")
    items[0]["label"] = "good" if items[0]["label"] == "bad" else "bad"
    make_rows(data, items)
    with pytest.raises(UserError, match="has changed"):
        api.resume(run.path, offline=True)


@pytest.mark.parametrize("best", ["loss", "f1", "matthews"])
def test_the_best_adapter_is_best_in_what_was_named(
    best: str, bert: Path, data: Path, tmp_path: Path
) -> None:
    run = run_tiny(bert, data, tmp_path / "run", eval__best=best)
    held = run.metrics("eval")
    chosen = run.state["best"]
    if best == "loss":
        assert chosen["loss"] == min(record["loss"] for record in held)
    else:
        assert chosen[best] == max(record[best] for record in held)
        equal = [record for record in held if record[best] == chosen[best]]
        assert chosen["loss"] == min(record["loss"] for record in equal)


# ==== afterwards =============================================================================================


def test_eval_measures_three_models(finished: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["eval", str(finished.path), "--offline", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    [accuracy, *others] = result["rows"]
    assert accuracy["metric"] == "accuracy"
    assert [row["metric"] for row in others] == ["f1", "matthews", "loss"]
    last = next(r for r in finished.metrics("eval") if r["step"] == finished.state["best"]["step"])
    first = finished.metrics("eval")[0]
    for row in result["rows"]:
        assert row["tuned"]["value"] == pytest.approx(last[row["metric"]], abs=1e-6)
        assert row["base"]["value"] == pytest.approx(
            first[row["metric"]], abs=1e-6
        )  # the head as it was drawn
    table = torch.tensor(result["confusion"])
    assert int(table.sum()) == result["settings"]["examples"] == 30
    assert float(table.diag().sum() / 30) == pytest.approx(accuracy["tuned"]["value"])
    assert accuracy["constant"]["value"] == pytest.approx(float(table.sum(1)[0]) / 30)  # bad is commoner
    assert accuracy["verdict"] == "better"
    assert (finished.path / "eval" / "held-out.json").is_file()


def test_eval_reads_a_file_and_prints_a_table(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [*rows(40, seed=3), {"text": "w9 " * 60, "label": "bad"}]
    assert (
        command(
            ["eval", str(finished.path), "--offline", "--data", str(make_rows(tmp_path / "new.jsonl", items))]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "always bad" in said
    assert "1 row left out" in said
    assert "label \\ answer" in said
    result = finished.read("eval/new.json", None)
    assert result["settings"]["examples"] == 40
    assert result["settings"]["rows"] != finished.read("eval/held-out.json", None)["settings"]["rows"]
    named = make_rows(tmp_path / "held-out.jsonl", items)
    with pytest.raises(UserError, match="would be kept as held-out"):
        use.evaluate(finished.path, data=str(named), offline=True)


def test_labels_that_training_does_not_have_are_refused(finished: Any, tmp_path: Path) -> None:
    file = make_rows(tmp_path / "new.jsonl", [*rows(3), {"text": "w1", "label": "odd"}])
    with pytest.raises(UserError, match="a label that training does not have"):
        use.evaluate(finished.path, data=str(file), offline=True)


def test_constant_answers_are_trainings_shares() -> None:
    found = constant(Labels(("a", "b", "c")), {"a": 6, "b": 2, "c": 0}).exp()
    assert found.tolist() == pytest.approx([6 / 8.5, 2 / 8.5, 0.5 / 8.5])
    assert constant(Labels(()), {"mean": 2.5}).tolist() == [2.5]


def test_a_merged_classifier_answers_the_same(each: Path, data: Path, tmp_path: Path) -> None:
    run = run_tiny(each, data, tmp_path / "run")
    result = api.merge(run.path, tmp_path / "merged", offline=True)
    assert result.verification is not None
    assert result.ok
    assert result.verification.adapter_kl is not None
    assert result.verification.mean_kl < result.verification.adapter_kl / 100
    merged = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    found = find_target(run.path)
    loaded, _ = load_found(found, None, offline=True)
    examples = use.held_labelled(found)[:8]
    with torch.no_grad():
        torch.testing.assert_close(
            padded_logits(merged, examples), padded_logits(loaded.model, examples), rtol=1e-4, atol=1e-5
        )
    assert merged.config.id2label == {0: "bad", 1: "good"}


def test_numbers_are_merged_and_a_wrong_merge_is_seen(bert: Path, tmp_path: Path) -> None:
    data = make_rows(tmp_path / "rows.jsonl", rows(numbers=True))
    run = run_tiny(bert, data, tmp_path / "run")
    assert run.state["best"]["metric"] == "pearson"
    result = api.merge(run.path, tmp_path / "merged", offline=True)
    assert result.ok
    table = use.evaluate(run.path, offline=True)
    assert [row["metric"] for row in table["rows"]] == ["pearson", "spearman", "loss"]
    assert "confusion" not in table


def test_what_only_text_can_have_is_refused(bert: Path, data: Path, finished: Any) -> None:
    refused = {
        "train__fast": True,
        "train__graphs": True,
        "train__compile": True,
        "train__recompute": "full",
        "train__micro_tokens": "fit",
        "model__attention": "varlen",
        "eval__prompts": ["hello"],
        "eval__best": "pearson",
        "method": {"name": "eva"},
    }
    for key, value in refused.items():
        with pytest.raises(UserError) as caught:
            shop_of(bert, data, **{key: value})
        assert key.replace("__", ".") in caught.value.message or "eva" in caught.value.message
    with pytest.raises(UserError, match="is a classifier"):
        use.open_target(finished.path, offline=True)
    with pytest.raises(UserError, match="task=classification"):
        resolve(None, {"model": "m", "data": "glue:rte", "output": "o"})
    with pytest.raises(UserError, match="classifier"):
        api.plan(model=str(bert), data=str(data), output="o", task="classification")


@pytest.mark.parametrize("method", ["dora", "vera", "bitfit", "full", "adapterh"])
def test_other_methods_train_classifiers(method: str, bert: Path, data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"method": method, "r": "auto", "train__max_steps": 3}
    run = run_tiny(bert, data, tmp_path / "run", **changes | {"target_modules": "auto"})
    assert run.state["status"] == "done"
    assert math.isfinite(use.evaluate(run.path, offline=True)["rows"][0]["tuned"]["value"])


def test_a_base_in_four_bits(bert: Path, data: Path, tmp_path: Path) -> None:
    run = run_tiny(bert, data, tmp_path / "run", model__quantize="nf4")
    assert run.state["status"] == "done"
    assert api.merge(run.path, tmp_path / "merged", offline=True).ok


hypothesis_settings.register_profile("quick", deadline=None)
hypothesis_settings.load_profile("quick")
assert set(PLAIN) == set(CONFIGS)
