"""What the benchmarks of speed and their tables rest on: batches, clock, our own step, counts, groups, words."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from loraloom.config import resolve
from loraloom.data import prepare

ROOT = Path(__file__).parents[1]
sys.path[:0] = [
    str(ROOT / name) for name in ("benchmarks/peers", "benchmarks", "tools")
]  # scripts, no packages
with pytest.MonkeyPatch.context() as patch:  # what kit sets for its own process is not for other tests
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        patch.setenv(name, os.environ.get(name, ""))
    kit, loop, loraloom_bench, collect = map(import_module, ("kit", "loop", "loraloom_bench", "collect"))
alpaca_run, random_folder, speed_floor, step_profile, fp8_quality = map(
    import_module, ("alpaca_run", "random_folder", "speed_floor", "step_profile", "fp8_quality")
)
speed_tables, tables = import_module("speed_tables"), import_module("tables")
TINY = "--model tiny --device cpu --steps 2 --warmup 1 --rank 4 --targets all --batch 2 --seq 48 --checkpoint off"


def arguments(*more: str) -> argparse.Namespace:
    return kit.parse(loraloom_bench.parser(), [*TINY.split(), *more])


# ---- batches and clock --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "padded", "packed"])
def test_every_tool_is_given_the_same_batches(kind: str):
    data = "random" if kind == "random" else "alpaca-like"
    a = arguments("--data", data, "--packing", "on" if kind == "packed" else "off", "--seq", "600")
    ours, theirs = kit.make_batches(a, a.runs[0]), kit.make_batches(a, a.runs[0])
    assert len(ours) == a.warmup + a.steps
    for one, other in zip(ours, theirs):
        assert torch.equal(one["ids"], other["ids"])
        labels = one["labels"]
        if kind == "packed":
            starts = torch.tensor([0, *one["lens"]]).cumsum(0)
            assert one["real"] == one["slots"] == starts[-1] <= 1200
            assert (one["pos"][0, starts[:-1]] == 0).all()
            assert (labels[0, starts[:-1]] == -100).all()
            assert int((labels != -100).sum()) == one["real"] - len(one["lens"])
        else:
            assert int((labels != -100).sum()) == one["real"] == int(sum(one.get("widths", [600, 600])))


def test_lengths_are_those_of_alpaca():
    sizes = torch.tensor(alpaca_run.lengths(50_000, seed=1), dtype=torch.float64)
    assert sizes.min() == 16
    assert sizes.max() == 1024
    assert abs(float(sizes.median()) - 110) < 2
    assert float(sizes.log().std()) == pytest.approx(0.6, abs=0.02)
    assert 6.4e6 < float(sizes.sum()) < 6.7e6


def test_the_clock_runs_until_the_seconds_are_up_and_takes_the_batches_in_turn():
    batches = ["warm", "a", "b", "c"]
    used, marks, losses = loop.run(lambda b: time.sleep(0.01) or 0.0, batches, 1, 0.1, cuda=False)
    assert used[:5] == ["warm", "a", "b", "c", "a"]
    assert len(marks) == len(used) + 1 == len(losses) + 1
    assert 0.1 <= marks[-1] - marks[1] < 1
    used, _, _ = loop.run(lambda b: 0.0, batches, 1, 0.0, cuda=False)
    assert used == batches


class Line:
    """A peer that learns one weight."""

    name, site = "line", ()

    def build(self, a: argparse.Namespace) -> None:
        if a.note == "broken":
            raise RuntimeError("no such line")
        torch.manual_seed(0)
        self.model = torch.nn.Linear(1, 1, bias=False)

    def loss(self, b: dict[str, Any]) -> torch.Tensor:
        return self.model(b["ids"].float().mean().view(1, 1)).sum()


def test_a_line_carries_norms_losses_and_seconds(capsys: pytest.CaptureFixture[str]):
    loop.main(Line, argv=[*TINY.split(), "--seconds", "0.05"])
    line = json.loads(capsys.readouterr().out)
    first = kit.make_batches(arguments(), arguments().runs[0])[0]["ids"].float().mean()
    assert line["grad_norm0"] == pytest.approx(float(first), abs=1e-4)  # d(w x) / dw
    assert line["sustained_s"] >= 0.05
    assert line["timed_steps"] >= 2
    assert line["trainable_params"] == 1
    assert line["params_without_grad"] == 0
    assert line["tokens_per_s"] == pytest.approx(96 * line["timed_steps"] / line["sustained_s"], rel=0.2)


def test_a_tool_that_fails_leaves_its_reason_and_the_next_one_runs(capsys: pytest.CaptureFixture[str]):
    loop.main(Line, argv=[*TINY.split(), "--note", "broken", "--batch", "1,2"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["error"] for line in lines] == ["RuntimeError: no such line"] * 2


# ---- our own step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["on", "off"])
def test_our_first_loss_is_that_of_the_documents_one_by_one(packing: str):
    a = arguments("--data", "alpaca-like", "--packing", packing, "--seq", "300")
    peer = loraloom_bench.Loraloom()
    peer.build(a)
    made = kit.make_batches(a, a.runs[0])[0]
    ids = made["ids"][0].split(made["lens"]) if packing == "on" else made["ids"]
    widths = made["lens"] or made["widths"]
    total, count = 0.0, 0
    with torch.no_grad():
        for row, width in zip(ids, widths):
            one = row[:width][None]
            logits = peer.model(one).logits.double()
            total += float(F.cross_entropy(logits[0, :-1], one[0, 1:], reduction="sum"))
            count += width - 1
    b = peer.prepare(made, a.runs[0])
    assert b["real"] == sum(widths)
    loss, norm = map(float, peer.step(b))
    assert loss == pytest.approx(total / count, abs=2e-3)  # bf16; the adapter is zero before the first step
    assert norm > 0
    assert peer.without_grad == 0
    assert float(peer.step(b)[0]) < loss


def test_variants_change_what_they_name_and_refuse_what_there_is_not():
    found = loraloom_bench.Loraloom.variants(
        arguments("--variants", "none;nf4,fp8=off;fp8,recompute=full,rank=8")
    )
    assert [(one.quant, one.fp8, one.recompute, one.rank) for one in found] == [
        ("none", "auto", "none", 4),
        ("nf4", "off", "none", 4),
        ("fp8", "auto", "full", 8),
    ]
    for wrong in ("nf4,fp8=perhaps", "nf4,colour=red"):
        with pytest.raises(SystemExit, match="there is no"):
            loraloom_bench.Loraloom.variants(arguments("--variants", wrong))


# ---- the whole command --------------------------------------------------------------------------------------


def test_written_samples_have_as_many_tokens_as_they_should(tmp_path: Path):
    words = random_folder.word_tokenizer(512)
    total = alpaca_run.write_data(tmp_path / "train.jsonl", 40, 508, seed=1)
    chosen = {"model": "none", "data": str(tmp_path / "train.jsonl"), "output": "none", "data.eval": 0}
    chosen |= {"data.prompt": "plain", "data.loss_on": "all", "data.max_length": 1024}
    config, _ = resolve(None, chosen)
    found = prepare(config.data, words, model_max_length=2048, progress=False).train
    assert found.lengths.tolist() == alpaca_run.lengths(40, seed=1)
    assert int(found.lengths.sum()) == total
    assert len({one.ids[0] for one in found}) > 10  # no row begins as all do


def test_the_command_trains_on_a_folder_that_was_written_for_it(tmp_path: Path):
    record = alpaca_run.main(
        "--model tiny --samples 24 --held-out 4 --batch 8 --rank 4 --device cpu "
        "--set train.micro_tokens=1024 --set eval.max_new_tokens=2 --set eval.every=3 "
        f"--folder {tmp_path} --out {tmp_path}/out.json".split()
    )
    found = record["result"]
    assert found["tokens"] == record["tokens_written"]
    assert found["steps"] == 3
    assert found["wall_s"] > found["run_s"] > found["steps_s"] > 0
    assert json.loads((tmp_path / "out.json").read_text())["result"] == found


# ---- floors and profiles ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "gflop", "bf16", "cudnn", "fp8"),
    [  # counted and measured apart from this code
        (128, 26.8, 24.3, 24.4, 43.0),
        (1024, 27.6, 22.9, 23.9, 38.9),
        (4096, 30.4, 19.2, 21.6, 29.1),
        (16384, 41.7, 11.7, 14.9, 14.8),
    ],
)
def test_the_floor_of_7b_at_r_16(length: int, gflop: float, bf16: float, cudnn: float, fp8: float):
    work = speed_floor.Work(4096, 11008, 32, 32, 32, 32000, 16, "all", 8192, length)
    assert work.linears + work.head == 6_607_077_376
    assert work.adapters == 39_976_960
    assert sum(speed_floor.operations(work).values()) / 8192 == pytest.approx(gflop * 1e9, rel=3e-3)
    for wanted, more in ((bf16, (False, False)), (cudnn, (False, True)), (fp8, (True, False))):
        least = speed_floor.floor(work, quant="none", fp8=more[0], cudnn=more[1])
        assert 8192 / sum(least.values()) == pytest.approx(wanted, rel=6e-3)


def test_recomputation_costs_a_forward_pass_more():
    work = speed_floor.Work(4096, 14336, 32, 32, 8, 128256, 16, "all", 8192, 1024, recompute=True)
    assert sum(speed_floor.operations(work).values()) / 8192 == pytest.approx(45.3e9, rel=3e-2)
    assert speed_floor.operations(work)["linears"] == 6 * 6_979_321_856 * 8192


def kernel(name: str, start: float, length: float, number: int = -1) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": start, "dur": length, "args": {"External id": number}}


def test_kernels_are_grouped_by_name_and_products_by_shape():
    events = [
        {"cat": "cpu_op", "name": "aten::mm", "args": {"External id": n, "Input Dims": dims}}
        for n, dims in enumerate(
            ([[8192, 4096], [4096, 12288]], [[8192, 4096], [4096, 48], []], [[1024, 4096], [4096, 32000]])
        )
    ]
    events += [kernel("nvjet_tst_256x128", 10.0 * n, 5.0, n) for n in range(3)]
    events += [kernel("flash_fwd_splitkv_kernel", 30, 2), kernel("_turn4_fp8", 31, 3)]
    events += [
        kernel("multi_tensor_apply_kernel", 40, 1),
        kernel("something_new", 41, 1),
        kernel("Cutlass", 42, 1),
    ]
    events += [{"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 99}]
    found = step_profile.grouped(events, vocab=32000, narrow=64)
    assert found["us"] == {
        "frozen products": 5,
        "low-rank products": 5,
        "head and loss": 5,
        "attention": 2,
        "dequantisation": 3,
        "optimizer and clipping": 1,
        "other": 1,
        "products of unknown shape": 1,
    }
    assert (found["busy_us"], found["span_us"]) == (15 + 4 + 3, 43)
    assert found["longest"]["other"] == {"something_new": 1}


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), min_size=1, max_size=20))
def test_idle_is_what_no_kernel_covers(spans: list[tuple[int, int]]):
    ends = [(start, start + length) for start, length in spans]
    covered = {t for start, end in ends for t in range(start, end)}
    busy, span = step_profile.occupied(ends)
    assert busy == len(covered)
    assert span == max(end for _, end in ends) - min(start for start, _ in ends)


# ---- gradients in fp8 ---------------------------------------------------------------------------------------


def test_cosines_of_gradients():
    one = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 4.0])}
    other = {"a": torch.tensor([3.0, 3.0]), "b": torch.tensor([0.0, 8.0])}
    found = fp8_quality.cosines(one, other)
    assert found["overall"] == pytest.approx((9 + 32) / (5 * math.sqrt(18 + 64)))
    assert found["lowest"] == pytest.approx(math.sqrt(0.5))
    assert found["lowest_in"] == "a"
    assert found["norm_ratio"] == pytest.approx(math.sqrt(82) / 5)
    with pytest.raises(ValueError, match="different tensors"):
        fp8_quality.cosines(one, {"a": other["a"]})


def test_a_comparison_of_nothing_is_refused():
    with pytest.raises(SystemExit, match="0 weights are multiplied in fp8"):
        fp8_quality.check_products(torch.nn.Linear(2, 2), True)


# ---- tables -------------------------------------------------------------------------------------------------


def line(peer: str, quant: str, speed: float, **more: Any) -> dict[str, Any]:
    row = {
        "peer": peer, "quant": quant, "tokens_per_s": speed, "step_ms": 1.0, "peak_mem_gb": 2.0, "loss0": 11.0,
        "lossN": 10.0, "grad_norm0": 0.5, "grad_normN": 0.4, "sustained_s": 10.0, "finite": True,
        "params_without_grad": 0, "checkpoint": "off", "device": "a card", "data": "random", "packing": "off",
        "versions": {"torch": "2.11.0", "transformers": "5.17.0", peer: "1"},
    }  # fmt: skip
    return row | more


def test_lines_are_collected_once_and_only_of_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [
        line("torchtune", "none", 100),
        line("torchtune", "nf4", 80),
        line("loraloom", "nf4", 160, fp8="on"),
    ]
    rows += [line("unsloth", "nf4", 90, grad_norm0=0.0), {"peer": "litgpt", "error": "out of memory"}]
    path = tmp_path / "main.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    collect.collect(path, "0123456789", tmp_path)
    path.write_text(json.dumps(line("loraloom", "nf4", 200, fp8="on")) + "\n")
    found = json.loads(collect.collect(path, "abcdefghij", tmp_path).read_text())
    assert [(row["peer"], row["tokens_per_s"], row["commit"][0]) for row in found["rows"]] == [
        ("torchtune", 100, "0"),
        ("torchtune", 80, "0"),
        ("loraloom", 200, "a"),
    ]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = speed_tables.speed_list("main")
    assert "| **LoRALoom** | NF4, fp8 products | no | 200 | 2.50 |" in text
    assert text.index("torchtune | bf16") < text.index("LoRALoom") < text.index("torchtune | NF4")
    assert "commit 0123456, abcdefg" in text


def test_what_is_not_measured_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert {make() for make in speed_tables.TABLES.values()} == {speed_tables.NOT_YET}


def test_every_table_of_speed_stands_in_its_page():
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert all(f"<!-- table: {name} -->" in page for name in speed_tables.TABLES)
    assert tables.filled(page, speed_tables.TABLES) == page


def test_profiles_whole_runs_and_gradients_become_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    about = {"what": "w", "machine": "m", "commit": "0123456789", "command": "c", "versions": {"torch": "2"}}
    one = {
        "setting": {"quant": "nf4", "fp8": True, "recompute": "none", "fast": "auto"},
        "measured": {"step_ms": 12.0},
        "groups_ms": {"frozen products": 6.0, "other": 3.0},
        "idle_ms": 1.0,
        "span_ms": 10.0,
        "floor_ms": {"frozen products": 5.0, "dequantisation": 0.5},
    }
    (tmp_path / "speed_profile.json").write_text(json.dumps(about | {"profiles": [one]}))
    text = speed_tables.profile()
    assert "| ms of a step | NF4, fp8 products | floor |" in text
    assert "| frozen products | 6.0 | 5.0 |" in text
    assert "| **all** | **12.0** | **5.5** |" in text
    runs = [{"fp8": fp8, "seed": 0, "loss": 0.5, "exact_match": 0.25 + fp8 / 2} for fp8 in (False, True)]
    cosines = {"overall": 0.97, "median": 0.96, "lowest": 0.8, "tensors": 3, "norm_ratio": 1.0}
    (tmp_path / "speed_fp8_quality.json").write_text(json.dumps(about | {"gradients": cosines, "runs": runs}))
    assert "| fp8 products | 0.500 | 0.500 | 0.750 | 0.750 |" in speed_tables.fp8_quality()
    found = {"tokens": 10, "wall_s": 4.0, "steps_s": 2.0, "evaluations_s": 1.0, "share_outside_of_steps": 0.5}
    found |= {"tokens_per_s_sustained": 5.0, "peak_gb": 1.0}
    run = about | {"samples": 2, "quantize": "nf4", "rank": 8, "set": ["train.epochs=1"], "result": found}
    (tmp_path / "speed_alpaca_run_nf4.json").write_text(json.dumps(run))
    assert "| NF4 | r 8 on all | 2 | 10 | 4 | 2 | 1 | 50 % | 5 | 1.0 |" in speed_tables.whole_run()
    run["set"] = ["target_modules=[q_proj,v_proj]", "dropout=0.05"]
    (tmp_path / "speed_alpaca_run_nf4.json").write_text(json.dumps(run))
    assert "| NF4 | r 8 on q_proj, v_proj, dropout 0.05 | 2 |" in speed_tables.whole_run()


def test_the_speed_tables_say_what_is_not_fused_and_how_long_passes_are():
    row = {"peer": "loraloom", "quant": "none", "fast": "off", "compile": "on", "data": "random"}
    assert speed_tables.base(row) == "bf16, not fused"
    assert speed_tables.tool(row) == "**LoRALoom**, compiled"
    packed: dict[str, Any] = {"peer": "loraloom", "data": "alpaca-like", "packing": "on", "seq": 2048}
    packed |= {"quant": "none", "checkpoint": "off", "tokens_per_s": 12}
    other = packed | {"peer": "torchtune", "batch": 4, "tokens_per_s": 10}
    assert speed_tables.over_best(packed | {"batch": 4}, [other]) == "1.20"
    assert speed_tables.over_best(packed | {"batch": 8}, [other]) == "", "passes of other lengths"
    assert speed_tables.tool(packed | {"batch": 8}) == "**LoRALoom**, passes of 16,384"
    assert speed_tables.tool(packed | {"batch": 4}) == "**LoRALoom**"
