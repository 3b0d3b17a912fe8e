"""The report: one page that needs nothing beside it, true to the run's numbers, whatever is missing."""

from __future__ import annotations

import builtins
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from fake_run import EVIL, STEPS, finished_run, make_run

from loraloom import cli
from loraloom.curves import smooth
from loraloom.errors import UserError
from loraloom.figures import POINTS, thin
from loraloom.files import write_json
from loraloom.report import build_report, compare
from loraloom.results import result, runs_table
from loraloom.rundir import Run
from loraloom.sections import shortest
from loraloom.verdict import verdict
from loraloom.wording import amount, duration, number, percent, size

VOID = {"meta", "br", "img", "link", "input", "hr"}
PARTS = (
    "Base beside tuned",
    "Held-out examples",
    "The same prompts",
    "<h2>Data",
    "What the adapter changed",
    "<h2>Merge",
)


class Page(HTMLParser):
    """Balanced tags, and what the page refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.downloads: dict[str, str] = {}
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = {name: value or "" for name, value in attrs}
        self.links += [
            values[name] for name in ("src", "href", "xlink:href", "data", "action") if name in values
        ]
        self.ids += [values["id"]] if "id" in values else []
        if "download" in values:
            self.downloads[values["download"]] = unquote(values["href"].partition(",")[2])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> tuple[str, Page]:
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "script" not in page.tags
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    return html, page


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_run(tmp_path_factory.mktemp("whole") / "tickets")


def test_the_page_stands_alone_and_holds_the_numbers(whole: Run) -> None:
    path = build_report(whole)
    assert path == whole.path / "report.html"
    html, page = read(path)
    best = result(whole).best_loss
    text = " ".join(page.text.split())
    assert f"Held-out loss fell from 2.904 (the base) to {number(best)} nats per token at step 100" in text
    assert "exact match rose from 12.1 % to 64.3 %" in text
    assert "All 5 checks passed." in text
    assert "1.187 ± 0.021" in text
    assert "within noise" in text
    assert "without any change: model.layers.2.self_attn.v_proj" in text
    assert "loraloom train -m org/small-model -d tickets.csv -o tickets" in text
    assert "99.8 %" in text  # top-1 agreement of the merge
    assert all(part in html for part in PARTS)
    assert path.stat().st_size < 400_000


def test_every_figure_has_its_numbers(whole: Run) -> None:
    html, page = read(build_report(whole))
    assert (
        html.count("<figure") == html.count("<summary>Numbers</summary>") - 1
    )  # the adapter's table has some too
    rows = [line.split(",") for line in page.downloads["loss.csv"].splitlines()]
    assert rows[0] == ["step", "train loss", "smoothed train loss", "held-out loss"]
    assert len(rows) == STEPS + 2
    train = whole.metrics("train")
    assert float(rows[2][1]) == train[0]["loss"]
    speed = page.downloads["speed.csv"].splitlines()[1].split(",")
    assert float(speed[1]) == pytest.approx(train[0]["tokens"] / train[0]["seconds"])
    assert page.downloads["samples.csv"].count("How do I reset my PIN?") == 7


def test_colours_follow_the_theme(whole: Run) -> None:
    html, _ = read(build_report(whole))
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert "#a1b2" not in drawings
    used = set(re.findall(r"var\((--\w+)\)", html))
    defined = set(re.findall(r"(--\w+):", html))
    assert used <= defined
    assert "<text" in drawings  # text stays text


def test_what_users_wrote_is_escaped(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "evil", {"data": EVIL, "eval.prompts": [EVIL]})
    run.sample({"step": 9, "prompt": EVIL, "answer": EVIL, "reference": EVIL, "stopped": False})
    run.add_check(EVIL, False, EVIL)
    run.update(status="failed", message=EVIL)
    manifest = run.read("data/manifest.json", {})
    write_json(
        run.path / "data" / "manifest.json", manifest | {EVIL: EVIL, "length_histogram": {EVIL: 3, "b": 1}}
    )
    table = run.read("eval/held-out.json", {})
    table["name"] = table["rows"][0]["metric"] = EVIL
    table["examples"][0] |= {"prompt": EVIL, "tuned": EVIL, "row": EVIL}
    write_json(run.path / "eval" / "held-out.json", table)
    write_json(run.path / "adapter" / "summary.json", {"layers": [{"name": EVIL, "norm_delta": 1.0}]})
    html, page = read(build_report(run))
    assert "img" not in page.tags
    assert "onerror" in page.text
    assert "<script>alert" not in html


def test_a_run_that_failed_at_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "failed")
    run.update(status="failed", message="the loss became nan in rows tickets.csv:17")
    html, page = read(build_report(run))
    assert "failed after 0 steps: the loss became nan in rows tickets.csv:17." in page.text
    assert "No held-out loss was measured" in page.text
    assert "svg" not in page.tags
    assert not any(part in html for part in PARTS)


@pytest.mark.parametrize(
    "missing", ["eval", "data", "adapter/summary.json", "merge.json", "samples.jsonl", "checks.json"]
)
def test_missing_parts_are_left_out(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraloom.figures.drawing", lambda *_: "<svg></svg>")
    run = finished_run(tmp_path / "run")
    path = run.path / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    read(build_report(run))


def test_odd_records_do_not_break_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "odd")
    run.log({"kind": "train", "step": 1, "loss": float("nan"), "tokens": 10, "seconds": 0, "memory": None})
    run.log({"kind": "train", "step": 2, "loss": 2.0, "grad_norm": float("inf"), "lr": None})
    run.log({"kind": "eval", "step": 2, "loss": 2.5})
    write_json(
        run.path / "eval" / "a.json", {"rows": [{"metric": "loss", "base": None, "tuned": {"value": 1.5}}]}
    )
    write_json(run.path / "eval" / "b.json", ["not a table"])
    write_json(run.path / "adapter" / "summary.json", {"layers": [{"name": "lm_head", "r": 4}, {"r": 1}]})
    run.sample({"step": 2, "prompt": "p", "answer": None})
    _, page = read(build_report(run))
    assert "the base was not measured" in page.text


def test_a_method_without_ranks_names_none_and_full_is_no_adapter(tmp_path: Path) -> None:
    for name, said in (
        ("full", "org/small-model (full; 10.1 M of 606 M weights, 1.67 %) was fine-tuned on"),
        ("bitfit", "An adapter for org/small-model (bitfit; 10.1 M of 606 M weights, 1.67 %) was trained on"),
        ("lora", "An adapter for org/small-model (lora; "),
    ):
        run = finished_run(tmp_path / name, {"method": name})
        assert said in verdict(run, result(run))[0].replace("\u202f", " ")
    run = finished_run(tmp_path / "r", {"r": 8, "alpha": 16})
    assert "(lora, r 8, alpha 16; " in verdict(run, result(run))[0]


def test_a_page_is_a_file_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(finished_run(tmp_path / name).path) for name in "ab"]
    (tmp_path / "pages").mkdir()
    monkeypatch.chdir(tmp_path)
    for given in (runs, runs[:1]):
        assert cli.run(["report", *given, "-o", "pages"]) == 2
        error = capsys.readouterr().err
        assert "pages is a folder" in error
        assert "-o pages/page.html" in error
    assert not [*tmp_path.glob(".partial*")]
    assert cli.run(["report", runs[0], "-o", "pages/one.html"]) == 0
    assert capsys.readouterr().out == "pages/one.html\n"
    assert (tmp_path / "pages" / "one.html").is_file()
    assert not (tmp_path / "a" / "report.html").exists()
    assert cli.run(["report", runs[0]]) == 0
    assert (tmp_path / "a" / "report.html").is_file()
    assert cli.run(["report", *runs]) == 0
    assert (tmp_path / "comparison.html").is_file()


def test_the_light_is_red_without_a_gain(tmp_path: Path) -> None:
    run = make_run(tmp_path / "worse")
    run.update(status="done", step=3, best={"step": 0, "loss": 2.9}, base_loss=2.9)
    html, page = read(build_report(run))
    assert "did not fall below the base" in page.text
    assert 'badge bad">done, no better than the base' in html


def test_comparison_shows_only_what_differs(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path / "r16", {"r": 16}),
        finished_run(tmp_path / "r64", {"r": 64, "train.learning_rate": 1e-4}, floor=1.0, seed=1),
    ]
    _, page = read(Path(compare(runs, tmp_path / "compare.html")["report"]))
    text = " ".join(page.text.split())
    settings = text[text.index("Settings that differ") : text.index("Curves")]
    assert "r 16 64" in settings
    assert "train.learning_rate auto 0.0001" in settings
    assert not any(name in settings for name in ("train.seed", "output", "model.id", "dropout"))
    assert "The best loss (held-out) is within noise: r16 (1.187 ± 0.021) and r64 (1.187 ± 0.021)" in text
    assert page.downloads["held-out.csv"].splitlines()[0] == "step,r16,r64"


def test_comparison_of_like_names_failed_runs_and_one(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a" / EVIL.replace("/", "")),
        make_run(tmp_path / "b" / EVIL.replace("/", "")),
    ]
    _, page = read(Path(compare(runs, tmp_path / "out.html")["report"]))
    assert "img" not in page.tags
    assert "None: the runs have the same settings." in page.text
    assert "a/<script>" in page.text
    with pytest.raises(UserError, match="at least two runs"):
        compare(runs[:1], tmp_path / "out.html")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_its_packages_it_says_how_to_get_them(
    whole: Run, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return ordinary(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=f"needs {package}") as error:
        build_report(whole)
    assert error.value.hint == "pip install 'loraloom[report]'"


def test_runs_table_reads_no_settings_and_bears_damage(tmp_path: Path) -> None:
    finished_run(tmp_path / "runs" / "good", {"method": "rslora"})
    damaged = make_run(tmp_path / "runs" / "sweep" / "bad")
    (damaged.path / "run.json").write_text("{")
    (tmp_path / "runs" / "good" / "config.resolved.yaml").write_text("nonsense: [")
    rows = {row["name"]: row for row in runs_table(tmp_path / "runs")}
    assert rows["sweep/bad"]["status"] == "unreadable"
    good = rows["good"]
    assert (good["status"], good["model"], good["method"]) == ("done", "org/small-model", "rslora")
    assert (good["steps"], good["base_loss"], good["exact_match"], good["seconds"]) == (
        STEPS,
        2.904,
        0.643,
        371.0,
    )
    assert 0 <= good["age"] < 600


def test_smooth_keeps_lines_straight_and_calms_noise() -> None:
    line = [5.0 - 0.01 * i for i in range(400)]
    assert smooth(line) == pytest.approx(line)
    rough = [value + (-1) ** i for i, value in enumerate(line)]
    assert max(abs(a - b) for a, b in zip(smooth(rough)[30:-30], line[30:-30])) < 0.05
    assert smooth([]) == []
    assert smooth([2.0]) == [2.0]


def test_thin_keeps_spikes() -> None:
    y = [1.0] * 50_000
    y[31_234] = 99.0
    x, kept = thin(list(range(len(y))), y)
    assert len(kept) <= POINTS + 2
    assert x[kept.index(99.0)] == 31_234


def test_shortest_names_tell_modules_apart() -> None:
    paths = {"attn.c_proj", "mlp.c_proj", "mlp.c_fc"}
    assert shortest(paths) == {"attn.c_proj": "attn.c_proj", "mlp.c_proj": "mlp.c_proj", "mlp.c_fc": "c_fc"}


def test_wording() -> None:
    assert [number(v) for v in (None, 0, 12431, 2.904, -0.5, 1.6e-4, True, 2.0e7)] == [
        "\N{EN DASH}", "0", "12\u202f431", "2.904", "\N{MINUS SIGN}0.5000", "1.6e-4", "yes", "2e7"
    ]  # fmt: skip
    assert [number(v, 2) for v in (0.021, 1.0, 0.0, 34.6)] == ["0.021", "1.0", "0", "35"]
    assert percent(0.0167) == "1.67\u202f%"
    assert amount(10_100_000) == "10.1\u202fM"
    assert size(8.7 * 2**30) == "8.7\u202fGiB"
    assert [duration(v) for v in (4.2, 59.7, 371, 11_040)] == [
        "4.2\u202fs", "1\u202fmin 00\u202fs", "6\u202fmin 11\u202fs", "3\u202fh 04\u202fmin"
    ]  # fmt: skip
