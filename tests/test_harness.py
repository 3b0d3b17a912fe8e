"""Benchmarks: our scores against lm-eval's own `hf` model, its metrics against numpy's and scipy's definitions."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from conftest import IN_CI
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager
from scipy.stats import binomtest
from task_files import make_task_files
from tiny import stir
from tiny_run import make_data, make_model, run_tiny

from loraloom import fold, harness, scores, tasks
from loraloom.adapt import attach
from loraloom.adapter_io import save_adapter
from loraloom.benchmark import benchmark
from loraloom.cli import run as cli
from loraloom.config import ModelConfig
from loraloom.dressing import tokens_of
from loraloom.errors import DataError, Failure, NonFinite, OutOfMemory, UserError
from loraloom.harness import Live, Options, dress_rows
from loraloom.model import load_model
from loraloom.rundir import Run
from loraloom.tasks import SHORT, differences, full_names, mmlu, truthfulqa, write_local
from loraloom.use import open_target

SIX = [name + tasks.LOCAL for name in SHORT.values()]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what lm-eval imports
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose context holds TruthfulQA's prompt."""
    return make_model(tmp_path_factory.mktemp("base") / "model", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def dense(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(base_folder, tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def nf4(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(base_folder, tmp_path_factory.mktemp("nf4"), model__quantize="nf4")


def trained(base: Path, folder: Path, **changes: Any) -> Run:
    data = make_data(folder / "data.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraloom.api.build_report", lambda run: None)
        return run_tiny(base, data, folder / "run", train__learning_rate=0.02, **changes)


def by_hf(
    folder: Path, files: Path, scratch: Path, limit: int, names: list[str], dtype: str = "float32"
) -> Any:
    """lm-eval alone: its own `hf` model, which loads the folder itself."""
    local = write_local(names, files, scratch, yaml_of=harness.yaml_of, shots=None)
    with harness.no_requests(True):
        return lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": dtype},
            tasks=[str(task.path) for task in local],
            device="cpu",
            batch_size=4,
            limit=limit,
            task_manager=TaskManager(include_defaults=False),
        )


def answers(results: dict[str, Any]) -> dict[tuple[str, int], list[float]]:
    return {
        (task, sample["doc_id"]): [value[0] for value in np.reshape(sample["filtered_resps"], (-1, 2))]
        for task, samples in results["samples"].items()
        for sample in samples
    }


def kept_answers(file: Path) -> dict[tuple[str, int], list[float]]:
    items = map(json.loads, file.read_text().splitlines())
    return {
        (item["task"], item["item"]): [v[0] for v in np.reshape(item["answers"], (-1, 2))] for item in items
    }


def assert_close(ours: dict[Any, list[float]], theirs: dict[Any, list[float]], nats: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        assert values == pytest.approx(theirs[key], abs=nats, rel=1e-6), key


# ==== equal to lm-eval's own hf ==============================================================================


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_scores_equal_hf_on_the_merged_folder(
    kind: str,
    request: pytest.FixtureRequest,
    base_folder: Path,
    files: Path,
    tmp_path: Path,
    no_sockets: None,
) -> None:
    """All six tasks, both sides in one process, no folder written; a 4-bit base is that of its dequantised merge."""
    tuned = request.getfixturevalue(kind)
    result = benchmark([str(tuned.path)], "article2", data_dir=files, limit=4)
    fold.merge(str(tuned.path), str(tmp_path / "merged"), dtype="float32")
    theirs = by_hf(tmp_path / "merged", files, tmp_path / "tasks", 4, list(SHORT.values()))
    folder = tuned.path / "eval" / "article2-limit4"
    ours = kept_answers(folder / "tuned" / "items.jsonl")
    assert_close(ours, answers(theirs), 1e-4)
    assert {row["metric"]: row["tuned"]["value"] for row in result["rows"]} == pytest.approx(
        {f"{name} acc": theirs["results"][name]["acc,none"] for name in SIX}, abs=1e-5
    )
    for row in result["rows"]:
        error = theirs["results"][row["task"]]["acc_stderr,none"]
        assert row["tuned"]["stderr"] == pytest.approx(error, abs=1e-5)
    base = kept_answers(folder / "base" / "items.jsonl")
    assert max(abs(a - b) for key in ours for a, b in zip(ours[key], base[key], strict=True)) > 0.1
    if kind == "dense":
        alone = by_hf(base_folder, files, tmp_path / "again", 4, list(SHORT.values()))
        assert_close(base, answers(alone), 1e-5)


def test_what_is_kept(dense: Run, files: Path) -> None:
    result = benchmark(
        [str(dense.path)], ["causative", "facts"], data_dir=files, limit=3, shots=2, name="two"
    )
    assert json.loads((dense.path / "eval" / "two.json").read_text()) == json.loads(json.dumps(result))
    settings = result["settings"]
    assert settings["limit"] == 3
    assert settings["lm_eval"] == lm_eval.__version__
    assert settings["dtype"] == "float32"
    assert not settings["chat_template"]
    about = settings["tasks"]["mmlu_global_facts_local"]
    assert (about["shots"], about["items"], about["of"], about["version"]) == (2, 3, 6, 1.0)
    assert about["source"].endswith("mmlu_global_facts_test.csv")
    assert settings["notes"] == ["blimp_causative_local is always asked with 0 shots"]
    own = json.loads((dense.path / "eval" / "two" / "tuned" / "results.json").read_text())
    assert own["results"]["blimp_causative_local"]["acc,none"] == result["rows"][0]["tuned"]["value"]
    for file in (dense.path / "eval" / "two").rglob("items.jsonl"):
        assert "cups" not in file.read_text()  # an item of a benchmark belongs into no file


# ==== methods whose texts are dressed ========================================================================


@pytest.fixture(scope="module")
def prefixed(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    changes = {"method": "prefix_embedding", "method__prefix": 3, "method__infix": 2}
    changes["data__packing"] = False
    run = trained(base_folder, tmp_path_factory.mktemp("prefix"), r="auto", **changes)
    return open_target(run.path)


def test_a_prefix_stands_before_the_context_and_an_infix_before_the_answer(prefixed: Any) -> None:
    model = prefixed.model
    prefix, infix = tokens_of(model)
    assert (len(prefix), len(infix)) == (3, 2)
    requests = [(("", ""), [5, 6, 7, 8], [9, 10]), (("", ""), [11], [12, 13, 14])]
    found = Live(model, prefixed.tokenizer, 2)._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, answer), (nats, _) in zip(requests, found, strict=True):
        ids = [*prefix, *context, *infix, *answer]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        start = len(ids) - len(answer)
        assert nats == pytest.approx(
            sum(float(logp[start + i - 1, x]) for i, x in enumerate(answer)), abs=1e-4
        )
    with prefixed.adapters.disabled():
        bare = Live(model, prefixed.tokenizer, 2)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert max(abs(a[0] - b[0]) for a, b in zip(found, bare, strict=True)) > 1e-3


def test_answers_are_those_of_generate(prefixed: Any) -> None:
    """lm-eval pads on the left and decodes through transformers' generate; ours is compared token by token."""
    from loraloom.generate import generate

    prompts = [[5, 6, 7, 8, 9], [10, 11]]
    expected = generate(prefixed.model, prompts, stop_ids=[], pad_id=prefixed.loaded.pad_id, max_new_tokens=6)
    live = Live(prefixed.model, prefixed.tokenizer, 2)
    pad = prefixed.loaded.pad_id
    context = torch.tensor([[5, 6, 7, 8, 9], [pad, pad, pad, 10, 11]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    out = live._model_generate(context, 11, ["never said"], attention_mask=mask, eos_token_id=None)
    assert torch.equal(out[:, :5], context)
    assert out[:, 5:].tolist() == [answer.ids for answer in expected]


@pytest.mark.parametrize(
    "method", ["lora", "dora", "vera", "hira", "alora", "adapterh", "prefix_layer", "lora_prefix"]
)
def test_every_kind_of_method_reads_as_itself(method: str, base_folder: Path) -> None:
    """In a padded batch, against one dressed text at a time through the model's own forward."""
    opened = open_target(base_folder, dtype="float32")
    own = {"invocation": [7]} if method == "alora" else {}
    adapters = attach(opened.model, method, **own)
    stir(adapters)
    adapters.eval()
    requests = requests_of([9, 5, 14])
    found = Live(opened.model, opened.tokenizer, 3)._loglikelihood_tokens(requests, disable_tqdm=True)
    prefix, infix = tokens_of(opened.model)
    for (_, context, answer), (nats, _) in zip(requests, found, strict=True):
        ids = [*prefix, *context, *infix, *answer]
        with torch.no_grad():
            logp = opened.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        start = len(ids) - len(answer)
        assert nats == pytest.approx(
            sum(float(logp[start + i - 1, x]) for i, x in enumerate(answer)), abs=1e-4
        )
    with adapters.disabled():
        bare = Live(opened.model, opened.tokenizer, 3)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert max(abs(a[0] - b[0]) for a, b in zip(found, bare, strict=True)) > 1e-3


def test_dressed_rows() -> None:
    ids, mask = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    rows, seen = dress_rows(ids, mask, [90, 91], [92])
    assert rows.tolist() == [[0, 90, 91, 5, 6, 92], [90, 91, 7, 8, 9, 92]]
    assert seen.tolist() == [[0, 1, 1, 1, 1, 1], [1] * 6]
    assert dress_rows(ids, mask, [], []) == (ids, mask)


# ==== the batch is found by itself ===========================================================================


@pytest.fixture
def plain(base_folder: Path) -> Any:
    return open_target(base_folder, dtype="float32")


def requests_of(lengths: list[int]) -> list[Any]:
    return [(("", ""), [1 + (i + k) % 90 for k in range(n - 2)], [7, 8 + i]) for i, n in enumerate(lengths)]


@given(lengths=st.lists(st.integers(3, 40), min_size=1, max_size=30), budget=st.integers(1, 300))
def test_a_batch_holds_what_fits(lengths: list[int], budget: int) -> None:
    """Padded to its longest text a batch stays within the budget, or is one text; none is smaller than need be."""
    live = Live.__new__(Live)
    live.tokens, live._max_length, live._first = budget, 1000, 0
    texts = sorted(requests_of(lengths), key=lambda request: -len(request[1]))
    chunks, held = [], []
    for i, text in enumerate(texts):  # how lm-eval gathers a batch
        held.append(text)
        if len(held) == live._batch_scheduler(i, texts):
            chunks.append(held)
            held = []
    chunks += [held] if held else []
    assert sum(map(len, chunks)) == len(lengths)
    for chunk in chunks:
        width = len(chunk[0][1]) + 2
        assert len(chunk) == 1 or len(chunk) * width <= budget
        assert chunk is chunks[-1] or (len(chunk) + 1) * width > budget


def test_too_large_a_batch_is_halved(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = requests_of([30, 4, 17, 9, 30, 12, 5, 6])
    expected = Live(plain.model, plain.tokenizer, 1)._loglikelihood_tokens(requests, disable_tqdm=True)
    shapes = []

    def limited(self: Any, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(inps.shape)
        if inps.numel() > 64:
            raise torch.OutOfMemoryError("as a GPU says it")
        return self.model(inps).logits

    monkeypatch.setattr(Live, "_model_call", limited)
    found = Live(plain.model, plain.tokenizer, None)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert max(shape[0] for shape in shapes) > 2
    with pytest.raises(OutOfMemory, match="--batch 8"):
        Live(plain.model, plain.tokenizer, 8)._loglikelihood_tokens(requests, disable_tqdm=True)
    with pytest.raises(OutOfMemory, match="one text"):
        Live(plain.model, plain.tokenizer, None)._loglikelihood_tokens(requests_of([80]), disable_tqdm=True)


# ==== task files =============================================================================================


def test_names() -> None:
    assert full_names("article2") == list(SHORT.values())
    assert full_names(" mc1, arc_easy,mc1,") == ["truthfulqa_mc1", "arc_easy"]
    with pytest.raises(UserError, match="names no task"):
        full_names(" ,")


words = st.text(
    st.characters(blacklist_characters=";\r\n\x00", blacklist_categories=("Cs", "Zs", "Cc")), min_size=1
)


@given(
    rows=st.lists(
        st.tuples(words, words, st.lists(words, min_size=1), st.lists(words, min_size=1)), max_size=5
    )
)
def test_truthfulqa_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("csv") / "TruthfulQA.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
        table.writerows([q, best, "; ".join(right), ";".join(wrong) + "; "] for q, best, right, wrong in rows)
    for doc, (question, best, right, wrong) in zip(truthfulqa(path), rows, strict=True):
        assert doc["question"] == question.strip()
        assert doc["mc1_targets"]["choices"] == [best.strip(), *(one.strip() for one in wrong)]
        assert doc["mc1_targets"]["labels"] == [1] + [0] * len(wrong)
        assert doc["mc2_targets"]["choices"] == [one.strip() for one in right + wrong]
        assert sum(doc["mc2_targets"]["labels"]) == len(right)


@pytest.mark.parametrize("digits", [2, 4])
def test_differences_are_those_of_the_published_kind(digits: int) -> None:
    docs = list(differences(digits))
    assert docs == list(differences(digits))
    assert len(docs) == 2000
    pairs = []
    for doc in docs:
        a, b = map(int, doc["context"].removeprefix("Q: What is ").removesuffix("?\n\nA:").split(" minus "))
        assert int(doc["completion"]) == a - b
        assert doc["completion"] == f" {a - b}"
        pairs.append((a, b))
    numbers = np.array(pairs)
    assert numbers.min() >= 0
    assert numbers.max() < 10**digits
    assert numbers.mean() == pytest.approx(10**digits / 2, rel=0.03)
    assert (numbers[:, 0] < numbers[:, 1]).mean() == pytest.approx(0.5, abs=0.05)


def test_files_that_are_wrong_are_named(files: Path, tmp_path: Path) -> None:
    def write(names: list[str], data: Path, shots: int | None = None) -> Any:
        return write_local(names, data, tmp_path / "out", yaml_of=harness.yaml_of, shots=shots)

    with pytest.raises(UserError, match="does not exist"):
        write(["arithmetic_2ds"], tmp_path / "nowhere")
    with pytest.raises(UserError, match="no form for arc_easy") as caught:
        write(["arc_easy"], files)
    assert "mc1 (truthfulqa_mc1)" in caught.value.details[0]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"blimp_causative\.jsonl is missing"):
        write(["blimp_causative"], empty)
    (empty / "mmlu_global_facts_test.csv").write_text("a,b,c,d,e,A\nq,1,2,3,4,E\n")
    with pytest.raises(DataError, match="row 2"):
        write(["mmlu_global_facts"], empty)
    (empty / "mmlu_global_facts_test.csv").write_text("q,1,2,3,4,B\n")
    assert next(mmlu(empty / "mmlu_global_facts_test.csv")) == {
        "question": "q",
        "choices": list("1234"),
        "answer": 1,
    }
    with pytest.raises(UserError, match="no solved examples"):
        write(["mmlu_global_facts"], empty, shots=5)
    (empty / "TruthfulQA.csv").write_text("Question,Best Answer\nq,a\n")
    with pytest.raises(DataError, match="no column 'Correct Answers'"):
        write(["truthfulqa_mc1"], empty)
    (empty / "blimp_causative.jsonl").write_text('{"sentence_good": "x", "sentence_bad": "y"}\n[]\n')
    with pytest.raises(DataError, match="line 2"):
        write(["blimp_causative"], empty)


def test_prompts_are_lm_evals_own(files: Path, tmp_path: Path) -> None:
    """The words of its YAML around our documents; solved examples come from the file of them."""
    local = write_local(list(SHORT.values()), files, tmp_path, yaml_of=harness.yaml_of, shots=2)
    loaded = harness.load_tasks([task.path for task in local], offline=True, progress=False)
    by_name = {task.config.task: task for task in loaded}
    assert list(by_name) == SIX

    def asked(name: str, shots: int = 0) -> list[tuple[str, str]]:
        task = by_name[name + tasks.LOCAL]
        task.set_config(key="num_fewshot", value=shots)
        task.build_all_requests(limit=1)
        return [instance.args for instance in task.instances]

    sums = asked("arithmetic_2ds")
    assert sums[0][0].startswith("Question: What is ")
    assert sums[0][0].endswith("?\nAnswer:")
    facts = asked("mmlu_global_facts", 2)
    assert facts[0][0].startswith(
        "The following are multiple choice questions (with answers) about global facts."
    )
    assert facts[0][0].count("dev: what is") == 2
    assert [choice for _, choice in facts] == [" A", " B", " C", " D"]
    truth = asked("truthfulqa_mc1")
    assert truth[0][0].endswith("\n\nQ: How many, if there are 0?\nA:")
    assert [choice for _, choice in truth] == [" It is 0 of them", " It is 1", " It is 2"]
    assert len(asked("truthfulqa_mc2")) == 4
    assert [choice for _, choice in asked("blimp_causative")] == [" Ann moved 0 cups.", " Ann rose 0 cups."]


def test_without_files_and_without_a_hub_it_is_said(no_sockets: None) -> None:
    with pytest.raises(Failure, match="the data of arithmetic_2ds is not on this machine") as caught:
        harness.load_tasks([harness.yaml_of("arithmetic/arithmetic_2ds.yaml")], offline=True, progress=False)
    assert "--data-dir" in str(caught.value.hint)
    with pytest.raises(Failure, match="the data of causative is not"):
        harness.load_tasks([harness.yaml_of("blimp/causative.yaml")], offline=True, progress=False)
    with pytest.raises(UserError, match="has no blimp/other"):
        harness.yaml_of("blimp/other.yaml")


def test_without_a_connection_it_is_said() -> None:
    """Nobody listens where the hub should be."""
    with pytest.raises(Failure, match="and there is no connection to fetch it"):
        harness.load_tasks([harness.yaml_of("arithmetic/arithmetic_4ds.yaml")], offline=False, progress=False)


def test_without_lm_eval_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "loraloom.harness")
    with pytest.raises(UserError, match="need lm-evaluation-harness") as caught:
        importlib.import_module("loraloom.harness")
    assert caught.value.hint == "pip install 'loraloom[eval]'"


# ==== noise ==================================================================================================


def results_of(values: dict[str, list[float]], metric: str = "acc", **more: Any) -> dict[str, Any]:
    """What lm-eval returns, of made-up items."""
    return {
        "results": {
            task: {
                f"{metric},none": float(np.mean(v)),
                f"{metric}_stderr,none": float(np.std(v, ddof=1) / len(v) ** 0.5),
            }
            for task, v in values.items()
        },
        "samples": {
            task: [{"doc_id": i, "filter": "none", "metrics": [metric], metric: x} for i, x in enumerate(v)]
            for task, v in values.items()
        },
        "higher_is_better": {task: {metric: True} for task in values},
        "n-samples": {task: {"effective": len(v), "original": len(v)} for task, v in values.items()},
    } | more


items = st.lists(st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)), min_size=2, max_size=30)


@given(pairs=items)
def test_a_difference_is_taken_item_by_item(pairs: list[tuple[float, float]]) -> None:
    before, after = (list(side) for side in zip(*pairs, strict=True))
    (row,) = scores.paired_rows(results_of({"t": before}), results_of({"t": after}))
    moved = np.subtract(after, before)
    assert row["change"] == pytest.approx(float(np.mean(moved)), abs=1e-9)
    assert row["change_stderr"] == pytest.approx(float(np.std(moved, ddof=1) / len(moved) ** 0.5), abs=1e-9)
    assert row["paired"]


@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_right_or_wrong_is_judged_by_the_exact_test(pairs: list[tuple[bool, bool]]) -> None:
    before, after = ([float(one) for one in side] for side in zip(*pairs, strict=True))
    (row,) = scores.paired_rows(results_of({"t": before}), results_of({"t": after}))
    gained, lost = (sum(b == x and a == y for b, a in pairs) for x, y in ((0, 1), (1, 0)))
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert row["verdict"] == ("within noise" if p >= 0.05 else "better" if gained > lost else "worse")


@pytest.mark.parametrize("weighted", [True, False])
def test_a_group_weighs_its_tasks_as_lm_eval_does(
    weighted: bool, plain: Any, files: Path, tmp_path: Path
) -> None:
    local = write_local(
        ["blimp_causative", "truthfulqa_mc2"], files, tmp_path, yaml_of=harness.yaml_of, shots=None
    )
    metric = {"metric": "acc", "weight_by_size": weighted}
    group = {"group": "both", "task": [task.name for task in local], "aggregate_metric_list": [metric]}
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    both = list(manager.load(["both"])["groups"].values())
    results = harness.measure(
        plain.model, plain.tokenizer, both, Options(limit=5), offline=True, progress=False
    )
    found = scores.read_scores(results)
    held = found["both", "acc"]
    assert next(iter(found)) == ("both", "acc")
    assert held.items == 10
    assert held.strata is not None
    assert len(held.strata) == 2
    errors = [np.std(list(v.values()), ddof=1) / len(v) ** 0.5 for _, v in held.strata]
    zero = scores.Score(
        "both", "acc", 0.0, 0.0, True, [(w, dict.fromkeys(v, 0.0)) for w, v in held.strata], 10
    )
    change = scores.change_of(zero, held)
    assert change.value == held.value
    assert change.stderr == pytest.approx(float(np.hypot(errors[0] / 2, errors[1] / 2)))


@pytest.mark.parametrize(("count", "said"), [(5, "within noise"), (50, "better")])
def test_few_items_have_wider_noise(count: int, said: str) -> None:
    """2.3 standard errors of the mean difference: beyond 1.96, within Student's 2.78 of 5 items."""
    pattern = [0.0, 0.2, 0.3, 0.4, 0.5]
    spread = float(np.std(pattern, ddof=1 if count == 5 else 0) / (count if count == 5 else count - 1) ** 0.5)
    shift = 2.3 * spread - float(np.mean(pattern))
    after = [0.3 + value + shift for value in pattern] * (count // 5)
    (row,) = scores.paired_rows(results_of({"t": [0.3] * count}), results_of({"t": after}))
    assert row["change"] / row["change_stderr"] == pytest.approx(2.3)
    assert row["verdict"] == said


def test_scores_that_are_no_means_have_their_own_errors() -> None:
    def perplexity(value: float) -> dict[str, Any]:
        held = results_of({"t": [0.0, 1.0] * 20}, "word_perplexity")
        held["results"]["t"] = {
            "word_perplexity,none": value,
            "word_perplexity_stderr,none": 0.3,
            "alias": "t",
        }
        for sample in held["samples"]["t"]:
            sample["word_perplexity"] = (-3.0, 2)
        held["higher_is_better"]["t"]["word_perplexity"] = False
        return held

    (row,) = scores.paired_rows(perplexity(9.0), perplexity(8.0))
    assert not row["paired"]
    assert row["change_stderr"] == pytest.approx(0.3 * 2**0.5)
    assert row["verdict"] == "better"
    assert row["unit"] == ""
    (row,) = scores.paired_rows(perplexity(9.0), perplexity(8.5))
    assert row["verdict"] == "within noise"
    unknown = perplexity(9.0), perplexity(8.0)
    for results in unknown:
        results["higher_is_better"]["t"]["word_perplexity"] = None
    assert scores.paired_rows(*unknown)[0]["verdict"] == "differs"


def test_models_are_compared_with_the_best_of_each_row() -> None:
    good, close, bad = [1.0] * 40, [0.0] + [1.0] * 39, [0.0] * 40
    (row,) = scores.column_rows([results_of({"t": one}) for one in (close, good, bad)])
    assert [one["verdict"] for one in row["cells"]] == ["within noise", "best", "worse"]
    with pytest.raises(ValueError, match="other items"):
        scores.column_rows([results_of({"t": good}), results_of({"t": bad[:3]})])


# ==== the command ============================================================================================


def test_the_command(dense: Run, base_folder: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, target = dense, str(dense.path)
    given = ["--tasks", "causative,2ds", "--data-dir", str(files), "--limit", "4"]
    capsys.readouterr()
    assert cli(["eval", target, *given, "--chat-template", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["chat_template"]
    assert [row["task"] for row in result["rows"]] == ["blimp_causative_local", "arithmetic_2ds_local"]
    page = (run.path / "report.html").read_text()
    assert "Base beside tuned: causative+2ds-limit4-chat" in page
    assert "blimp_causative_local, acc" in page
    assert "blimp_causative.jsonl" in page
    assert cli(["eval", target, *given]) == 0
    shown = capsys.readouterr()
    assert "blimp_causative_local" in shown.out
    assert "0 shots" in shown.out
    assert "the first 4 items of each task" in shown.out
    assert shown.err == ""
    plainly = json.loads(
        (run.path / "eval" / "causative+2ds-limit4" / "base" / "items.jsonl").read_text().splitlines()[0]
    )
    assert plainly["answers"]
    assert cli(["eval", str(base_folder), target, *given, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [model["target"] for model in table["models"]] == [str(base_folder), target]
    for row, before in zip(
        table["rows"], json.loads((run.path / "eval" / "causative+2ds-limit4.json").read_text())["rows"]
    ):
        assert [one["value"] for one in row["cells"]] == [before[side]["value"] for side in ("base", "tuned")]
    assert cli(["eval", str(base_folder), target, *given]) == 0
    assert "within noise of the best of its row" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--limit", "3"], "--limit goes with --tasks"),
        (["x", "--tasks", "2ds", "--answers", "3"], "--answers goes without --tasks"),
        (["--tasks", "2ds"], "Missing argument 'RUN'"),
        (["x", "y"], "several runs are compared by --tasks"),
        (["x", "y", "-m", "z", "--tasks", "2ds"], "--model names the base of one target"),
    ],
)
def test_what_does_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_tasks_that_let_a_model_write(plain: Any, tmp_path: Path, no_sockets: None) -> None:
    """A task of one's own, by its YAML; the references are what the model says, so that all are right."""
    from loraloom.generate import generate

    prompts = [f"count {i} and {i}" for i in range(5)]
    ids = [plain.tokenizer(prompt)["input_ids"] for prompt in prompts]
    said = generate(
        plain.model, ids, stop_ids=plain.loaded.stop_ids, pad_id=plain.loaded.pad_id, max_new_tokens=5
    )
    docs = [{"q": q, "a": plain.tokenizer.decode(one.ids)} for q, one in zip(prompts, said, strict=True)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = {
        "task": "saying",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "docs.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["never said"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "saying.yaml").write_text(json.dumps(task))
    loaded = harness.load_tasks([tmp_path / "saying.yaml"], offline=True, progress=False)
    for options in (Options(), Options(batch=2)):
        results = harness.measure(plain.model, plain.tokenizer, loaded, options, offline=True, progress=False)
        score = scores.read_scores(results)["saying", "exact_match"]
        assert (score.value, score.items, score.is_share) == (1.0, 5, True)
        assert results["used"] == ([5] if options.batch is None else [1, 2])
    result = benchmark([plain.target], str(tmp_path / "saying.yaml"), dtype="float32", offline=True)
    assert result["name"] == "saying"
    assert result["rows"][0]["cells"] == [{"value": 1.0, "stderr": 0.0}]
    with pytest.raises(UserError, match="there is no file"):
        benchmark([plain.target], str(tmp_path / "other.yaml"), offline=True)
    with pytest.raises(UserError, match="cannot be named"):
        benchmark([plain.target], "2ds", name="a/b")


def test_a_model_that_does_not_compute_has_no_score(plain: Any, files: Path, tmp_path: Path) -> None:
    """The first choice of NaNs would be the likeliest, and it is often the right one."""
    local = write_local(["blimp_causative"], files, tmp_path, yaml_of=harness.yaml_of, shots=None)
    loaded = harness.load_tasks([task.path for task in local], offline=True, progress=False)
    weight = plain.model.get_output_embeddings().weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    try:
        with pytest.raises(NonFinite, match="log-likelihoods are no numbers"):
            harness.measure(
                plain.model, plain.tokenizer, loaded, Options(limit=2), offline=True, progress=False
            )
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_chat_template_must_be_there(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        harness.measure(plain.model, plain.tokenizer, [], Options(chat=True), offline=True, progress=False)


# ==== the real small model ===================================================================================


@pytest.fixture(scope="session")
def real_files() -> Path:
    """The published files, beside the project or where LORALOOM_DATA says."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LORALOOM_DATA") or default)
    if not folder.is_dir() and not IN_CI:
        pytest.skip(f"the benchmarks' files do not lie in {folder}; LORALOOM_DATA names another folder")
    return folder


@pytest.mark.slow
def test_no_short_name_hides_one_of_lm_evals() -> None:
    known = {name for names in harness.task_names().values() for name in names}
    assert not known & {*SHORT, tasks.ARTICLE, "list"}
    assert set(SHORT.values()) <= known
    with pytest.raises(UserError, match="no task 'arc_esay'") as caught:
        harness.load_tasks(["arc_esay"], offline=True, progress=False)
    assert "arc_easy" in str(caught.value.hint)


@pytest.fixture(scope="module")
def real_adapter(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes every answer: drawn at random, not trained."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = load_model(ModelConfig(id=str(real_model), dtype="float32")).model
    adapters = attach(model, "lora", r=8, target_modules=["q", "v", "mlp"])
    stir(adapters, size=0.04)
    save_adapter(adapters, folder, base_model=str(real_model))
    return folder


@pytest.mark.slow
def test_six_tasks_on_the_real_model(real_adapter: Path, real_files: Path) -> None:
    """In bfloat16, as one evaluates on a CPU; the base knows its causatives as it did when all 1,000 were asked."""
    result = benchmark([str(real_adapter)], "article2", data_dir=real_files, limit=5, dtype="bfloat16")
    assert [row["task"] for row in result["rows"]] == SIX
    assert {row["items"] for row in result["rows"]} == {5}
    assert all(0 <= row[side]["value"] <= 1 for row in result["rows"] for side in ("base", "tuned"))
    (row,) = benchmark([str(real_adapter)], "causative", data_dir=real_files, limit=100, dtype="bfloat16")[
        "rows"
    ]
    assert row["base"]["value"] == pytest.approx(0.635, abs=3 * row["base"]["stderr"])


@pytest.mark.slow
@pytest.mark.parametrize(("names", "limit"), [("causative,facts,2ds,4ds", 8), ("mc1,mc2", 1)])
def test_real_scores_equal_hf_on_the_merged_folder(
    names: str,
    limit: int,
    real_adapter: Path,
    real_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float32, thirty layers, each log-likelihood of the answers: measured at 2.3e-5 nats apart."""
    seen = []
    measure = harness.measure
    monkeypatch.setattr(harness, "measure", lambda *a, **k: seen.append(measure(*a, **k)) or seen[-1])
    result = benchmark([str(real_adapter)], names, data_dir=real_files, limit=limit, dtype="float32")
    fold.merge(str(real_adapter), str(tmp_path / "merged"), dtype="float32", no_verify=True)
    theirs = by_hf(tmp_path / "merged", real_files, tmp_path / "tasks", limit, full_names(names))
    base, tuned = (answers(results) for results in seen)
    assert_close(tuned, answers(theirs), 2e-4)
    assert max(abs(a - b) for key in base for a, b in zip(base[key], tuned[key], strict=True)) > 1
    for row in result["rows"]:
        assert row["tuned"]["value"] == pytest.approx(theirs["results"][row["task"]]["acc,none"], abs=1e-4)
