"""The family on a real model: what each method learns of the demo's task, at the rate that suits it, over seeds.

    python benchmarks/method_study.py --jobs 8                 one GPU; --minutes 9 to stop in time, call again to go on
    python benchmarks/method_study.py --preset cpu             three methods, few steps: minutes on two CPU cores

SmolLM2-135M-Instruct, two-digit subtraction as in examples/subtraction.yaml. Of the sums that the demo trains on,
500 are set aside to choose by; the demo's 500 held-out ones are used for nothing but the reported figures.

    search   one seed at the method's default rate x 1/3, 1 and 3; where the best is at an end, up to `--extend`
             steps of 3 further; the lowest loss on the set to choose by
    report   three other seeds at that rate: loss and exact match on the final set, of the weights of the last step

r = 16 on all linear layers but for methods with ranks of their own; as many steps, and the same data in the same
order, for all. Steps and evaluations are those of `loraloom train` and `loraloom eval`, without a run folder. A method
that fails leaves its error. Written to benchmarks/results/method_study.json after each run; finished runs of
the same settings and commit are not made again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import queue
import re
import statistics
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from command_line import command_line
from method_run import DATA

from loraloom import methods

ROOT = Path(__file__).parents[1]
HELD_BACK = 500  # of the demo's training sums, to choose rates by
SEARCH_SEED = 100  # reported seeds are 0, 1, 2
FIRST = "lora loraplus rslora dora pissa vera lorafa adalora deltalora loradrop "
FIRST += "bitfit adapterh prefix_embedding prefix_layer full"
MORE = "olora milora hira randlora eva corda loraga loraone lorapro loraxs lora_prefix adapterl"
PRESETS: dict[str, dict[str, Any]] = {
    "gpu": {
        "methods": f"{FIRST} {MORE}".replace(" ", ","),
        "rates": "1/3,1,3",
        "extend": 3,
        "seeds": 3,
        "steps": 120,
        "batch": 32,
        "every": 10,
        "choose": 500,
        "final": 500,
    },
    "cpu": {
        "methods": "lora,vera,bitfit",
        "rates": "10",  # so few steps take large ones; LoRA's is then the demo's 2e-3
        "extend": 0,
        "seeds": 1,
        "steps": 30,
        "batch": 16,
        "every": 10,
        "choose": 60,
        "final": 100,
    },
}
NOTES = {
    "bitfit": "with add_missing: Llama has no biases, so every linear layer is given one",
    "deltalora": "start after a quarter of the steps",
    "loradrop": "its probe's 20 steps come on top",
}


class Study:
    """The runs so far, and the processes that make more."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.began, self.lock = a, time.monotonic(), Lock()
        self.record = about(a)
        self.runs = earlier(a, self.record)
        self.idle: queue.Queue[subprocess.Popen[str] | None] = queue.Queue()
        for _ in range(a.jobs):
            self.idle.put(None)

    def ask(self, method: str, factor: float, seed: int, *, report: bool) -> dict[str, Any] | None:
        """A run, made now or before; None when time is up."""
        key = {"method": method, "factor": float(f"{factor:.6g}"), "seed": seed}
        for run in list(self.runs):
            if key.items() <= run.items():
                return run
        process = self.idle.get()
        try:
            if self.a.minutes and time.monotonic() - self.began > 60 * self.a.minutes:
                return None
            process = process or start()
            rate = methods.find(method).learning_rate * factor
            task = key | {
                "rate": float(f"{rate:.3g}"),
                "report": report,
                "base": method == "lora" and seed == 0,
            }
            found = task | exchange(process, task | vars(self.a))
            if process.poll() is not None:
                process = None
        finally:
            self.idle.put(process)
        with self.lock:
            self.runs.append({k: v for k, v in found.items() if k not in ("report", "base")})
            self.write()
            print(f"{time.monotonic() - self.began:6.0f} s  {words(self.runs[-1])}", flush=True)
        return self.runs[-1]

    def method(self, name: str) -> None:
        """Search the rate, then report over seeds; what fails here does not stop the other methods."""
        try:
            self.study(name)
        except Exception:
            traceback.print_exc()

    def study(self, name: str) -> None:
        factors = [number(part) for part in self.a.rates.split(",")]
        with ThreadPoolExecutor(4) as pool:
            search = len(factors) > 1
            tried = dict(zip(factors, pool.map(lambda f: self.search(name, f), factors))) if search else {}
            for _ in range(self.a.extend if search else 0):
                best = min(tried, key=tried.__getitem__)
                if not math.isfinite(tried[best]) or best not in (min(tried), max(tried)):
                    break
                further = best * 3 if best == max(tried) else best / 3
                tried[further] = self.search(name, further)
            best = min(tried, key=tried.__getitem__) if search else factors[0]
            if not search or math.isfinite(tried[best]):
                list(pool.map(lambda s: self.ask(name, best, s, report=True), range(self.a.seeds)))

    def search(self, name: str, factor: float) -> float:
        """The loss to choose by."""
        found = self.ask(name, factor, SEARCH_SEED, report=False)
        loss = (found or {}).get("chosen_by", math.inf)
        return loss if math.isfinite(loss) else math.inf

    def write(self) -> None:
        order = list(dict.fromkeys([*self.a.methods.split(","), *(run["method"] for run in self.runs)]))
        runs = sorted(self.runs, key=lambda r: (order.index(r["method"]), r["seed"], r["factor"]))
        base = next((run for run in runs if "base_loss" in run), {})
        self.record["base"] = {key: base.get(f"base_{key}") for key in ("loss", "exact_match")}
        self.record["table"] = {
            name: summary(name, runs) for name in order if any(run["method"] == name for run in runs)
        }
        text = json.dumps(self.record | {"runs": "RUNS"}, indent=2)
        lines = ",\n".join(f"    {json.dumps(run)}" for run in runs)
        Path(self.a.out).write_text(text.replace('"RUNS"', f"[\n{lines}\n  ]") + "\n", encoding="utf-8")

    def stop(self) -> None:
        for _ in range(self.a.jobs):
            process = self.idle.get()
            if process is not None:
                assert process.stdin is not None
                process.stdin.close()
                process.wait(timeout=60)


def start() -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).with_name("method_run.py"))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def exchange(process: subprocess.Popen[str], task: dict[str, Any]) -> dict[str, Any]:
    """Hand a task to a process and wait for its result; an error if the process is gone."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("RESULT "):
                return dict(json.loads(line.removeprefix("RESULT ")))
    return {"error": f"the process ended with {process.wait()}"}


def summary(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A method's row: the rates tried, and the reported seeds' mean, lowest and highest."""
    own = [run for run in runs if run["method"] == name]
    tried = {f"{run['rate']:g}": run.get("chosen_by") for run in own if run["seed"] == SEARCH_SEED}
    final = [run for run in own if run["seed"] != SEARCH_SEED and "loss" in run]
    row: dict[str, Any] = {
        "note": NOTES.get(name, ""),
        "default_rate": methods.find(name).learning_rate,
        "tried": tried,
        "errors": sorted({run[key] for run in own for key in ("error", "diverged") if key in run}),
    }
    if not final:
        return row
    rates = [float(rate) for rate in tried]
    row |= {
        "rate": final[0]["rate"],
        "at_an_end": bool(rates) and final[0]["rate"] in (min(rates), max(rates)),
    }
    row |= {"trained": final[0]["trained"], "seeds": [run["seed"] for run in final]}
    for key in ("loss", "exact_match", "train_seconds", "start_seconds", "peak_gb"):
        values = [run[key] for run in final if key in run]
        if values:
            row[key] = {"mean": statistics.mean(values), "lowest": min(values), "highest": max(values)}
    return row


def words(run: dict[str, Any]) -> str:
    head = f"{run['method']} at {run['rate']:g}, seed {run['seed']}: "
    if "chosen_by" not in run:
        return head + str(run.get("diverged") or run.get("error"))
    final = f", final {run['loss']:.4f}, exact match {run['exact_match']:.3f}" if "loss" in run else ""
    return head + f"loss {run['chosen_by']:.4f}{final}, {run['train_seconds']:.0f} s"


def number(text: str) -> float:
    over, _, under = text.partition("/")
    return float(over) / float(under or 1)


def earlier(a: argparse.Namespace, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Finished runs of the same settings and commit in the file that will be written; errors are tried again."""
    if not Path(a.out).is_file():
        return []
    before = json.loads(Path(a.out).read_text(encoding="utf-8"))
    same = all(before.get(key) == record[key] for key in ("settings", "commit", "machine", "versions"))
    return [run for run in before["runs"] if "error" not in run] if same else []


def write_data() -> None:
    """The demo's sums in three files: to train on, to choose by, and the final ones."""
    place = importlib.util.spec_from_file_location("subtraction", ROOT / "examples" / "subtraction.py")
    assert place is not None
    assert place.loader is not None
    demo = importlib.util.module_from_spec(place)
    place.loader.exec_module(demo)
    DATA.mkdir(parents=True, exist_ok=True)
    pairs = demo.sums()
    last = demo.HELD_OUT + HELD_BACK
    for name, part in (("final", pairs[: demo.HELD_OUT]), ("choose", pairs[demo.HELD_OUT : last])):
        demo.write(DATA / f"{name}.jsonl", part)
    demo.write(DATA / "train.jsonl", pairs[last:])


def about(a: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    kept = ("rates", "extend", "steps", "batch", "every", "choose", "final", "model")
    return {
        "what": "two-digit subtraction, SmolLM2-135M-Instruct, each method at the rate found for it",
        "command": re.sub(r" --minutes \S+", "", command_line()),
        "commit": a.commit or commit.stdout.strip(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "runs_at_once": a.jobs,
        "versions": {name: version(name) for name in ("torch", "transformers", "loraloom")},
        "settings": {key: getattr(a, key) for key in kept} | {"r": 16},
    }


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="gpu")
    p.add_argument("--methods", help="separated by commas")
    p.add_argument("--rates", help="factors of the default rate, such as 1/3,1,3; a single one: no search")
    for name in ("extend", "seeds", "steps", "batch", "every", "choose", "final"):
        p.add_argument(f"--{name}", type=int)
    p.add_argument("--model", default="smollm2-135m-instruct", help="another one, to try it")
    p.add_argument("--jobs", type=int, default=1, help="runs at once")
    p.add_argument("--minutes", type=float, help="begin no run after so many")
    p.add_argument("--commit", default="", help="where there is no repository to ask")
    p.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "method_study.json"))
    a = p.parse_args()
    for name, value in PRESETS[a.preset].items():
        setattr(a, name, value if getattr(a, name) is None else getattr(a, name))
    return a


def main() -> None:
    a = arguments()
    write_data()
    study = Study(a)
    names = a.methods.split(",")
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(study.method, names))
    study.write()
    study.stop()


if __name__ == "__main__":
    main()
