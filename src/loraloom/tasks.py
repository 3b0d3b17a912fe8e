"""Benchmarks by name, and the six of the article from files on this disk.

Any task, group or tag of lm-evaluation-harness goes by its own name. The six have short names, and with a data
folder they need no hub: each becomes a task NAME_local that takes prompt, splits and metric from lm-eval's own YAML
by `include`, and only its documents from here.

  truthfulqa_mc1, _mc2    TruthfulQA.csv, as published; MC1 is the best answer against all incorrect ones, which is
                          harder than the authors' own four or five choices: its scores are not the published ones
  blimp_causative         blimp_causative.jsonl, as published
  mmlu_global_facts       mmlu_global_facts_test.csv: question, four choices, letter; _dev.csv beside it for shots
  arithmetic_2ds, _4ds    generated: two numbers below 10^2 or 10^4, uniform and apart, the answer may be negative

raises  UserError for a file that is missing, DataError with file and row for one that is not in its format
source  arXiv:2005.14165, section 3.9.1 (arithmetic); tests/test_harness.py
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import DataError, UserError, did_you_mean
from .files import digest, write_text

SHORT = {
    "mc1": "truthfulqa_mc1",
    "mc2": "truthfulqa_mc2",
    "causative": "blimp_causative",
    "facts": "mmlu_global_facts",
    "2ds": "arithmetic_2ds",
    "4ds": "arithmetic_4ds",
}
ARTICLE = "article2"  # all six
LOCAL = "_local"  # the end of a task's name whose documents are from here
SUMS, SEED = 2000, 20051  # as many as the published set has; a seed that no run has by default
Doc = dict[str, Any]


@dataclass(frozen=True)
class LocalTask:
    """A task whose documents are from here: its name and YAML, what they were read from, how many they are."""

    name: str
    path: Path
    source: str
    digest: str  # SHA-256 of the documents as lm-eval gets them
    count: int

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "sha256": self.digest, "documents": self.count}


def full_names(given: str | Sequence[str]) -> list[str]:
    """lm-eval's names for a list such as "mc1,arc_easy" or "article2", each once, in order.

    raises  UserError if there is none
    """
    parts = given.split(",") if isinstance(given, str) else given
    named = [part.strip() for part in parts if part.strip()]
    whole = [
        name for part in named for name in (SHORT.values() if part == ARTICLE else [SHORT.get(part, part)])
    ]
    if not whole:
        raise UserError("--tasks names no task", hint=f"for example --tasks {ARTICLE}, or --tasks list")
    return list(dict.fromkeys(whole))


def write_local(
    names: Sequence[str], data_dir: Path, folder: Path, *, yaml_of: Callable[[str], Path], shots: int | None
) -> list[LocalTask]:
    """Write each task's documents and its YAML into `folder`, for lm-eval to include.

    yaml_of  where lm-eval keeps a YAML
    shots    solved examples before each question, if they are asked for

    raises  UserError for a task that cannot be had from files, a missing file, shots that the files lack
    """
    if not data_dir.is_dir():
        raise UserError(
            f"the folder {data_dir} does not exist", hint="--data-dir names one with the tasks' files"
        )
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise UserError(
            f"--data-dir has no form for {', '.join(unknown)}",
            details=[f"it serves: {', '.join(f'{short} ({name})' for short, name in SHORT.items())}"],
            hint="evaluate it without --data-dir, which fetches its data",
        )
    return [write_task(name, data_dir, folder, yaml_of(SOURCES[name].yaml), shots) for name in names]


def write_task(name: str, data_dir: Path, folder: Path, installed: Path, shots: int | None) -> LocalTask:
    source = SOURCES[name]
    text = lines(source.read(data_dir))
    if not text:
        raise DataError(f"{source.about(data_dir)} holds no items")
    write_text(folder / f"{name}.jsonl", text)
    files = {source.split: str(folder / f"{name}.jsonl")}
    task: dict[str, Any] = {"include": str(installed), "task": name + LOCAL, "tag": None}
    if source.solved is not None:
        solved = data_dir / source.solved
        if solved.is_file():
            write_text(folder / f"{name}.dev.jsonl", lines(mmlu(solved)))
            files["dev"] = str(folder / f"{name}.dev.jsonl")
        elif shots:
            raise UserError(f"{name} has no solved examples: {solved} is missing", hint="leave --shots out")
        else:
            task["fewshot_split"] = None
    task |= {"dataset_path": "json", "dataset_name": None}
    task["dataset_kwargs"] = {"data_files": files, "cache_dir": str(folder / "cache")}
    path = folder / f"{name}{LOCAL}.yaml"
    write_text(path, yaml.safe_dump(task, sort_keys=False))
    return LocalTask(name + LOCAL, path, source.about(data_dir), digest(text), text.count("\n"))


def lines(docs: Iterator[Doc]) -> str:
    return "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs)


@dataclass(frozen=True)
class Source:
    """Where a task's documents come from.

    yaml    lm-eval's own, from its folder of tasks
    split   which of lm-eval's splits they are
    make    the documents, from the file or, without one, from nothing
    solved  the file of solved examples for shots, if the task has a split of its own for them
    """

    yaml: str
    split: str
    make: Callable[..., Iterator[Doc]]
    file: str | None = None
    digits: int = 0
    solved: str | None = None

    def read(self, data_dir: Path) -> Iterator[Doc]:
        """raises  UserError if the file is missing"""
        if self.file is None:
            return self.make(self.digits)
        path = data_dir / self.file
        if not path.is_file():
            held = sorted(item.name for item in data_dir.iterdir())
            raise UserError(f"{path} is missing", hint=did_you_mean(self.file, held))
        return self.make(path)

    def about(self, data_dir: Path) -> str:
        return str(data_dir / self.file) if self.file else f"generated, seed {SEED}"


def truthfulqa(path: Path) -> Iterator[Doc]:
    """The rows of TruthfulQA.csv, with the choices of both tasks; answers are set apart by semicolons."""
    columns = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise DataError(f"{path} has no column {missing[0]!r}", details=[f"it has: {reader.fieldnames}"])
        for number, row in enumerate(reader, 2):
            question, best = ((row[name] or "").strip() for name in columns[:2])
            right, wrong = (parted(row[name] or "") for name in columns[2:])
            if not (question and best and right and wrong):
                raise DataError(
                    f"{path}, row {number}: a question needs a best, a correct and an incorrect answer"
                )
            yield {
                "question": question,
                "mc1_targets": {"choices": [best, *wrong], "labels": [1] + [0] * len(wrong)},
                "mc2_targets": {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)},
            }


def parted(answers: str) -> list[str]:
    return [answer.strip() for answer in answers.split(";") if answer.strip()]


def blimp(path: Path) -> Iterator[Doc]:
    """Minimal pairs."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            yield {name: row[name] for name in ("sentence_good", "sentence_bad")}
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}, line {number}: not a pair of sentence_good and sentence_bad", details=[str(error)]
            ) from error


def mmlu(path: Path) -> Iterator[Doc]:
    """Questions with four choices; the answer as its number."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if len(row) != 6 or row[5].strip() not in list("ABCD"):
                raise DataError(f"{path}, row {number}: not a question, four choices and one of A, B, C, D")
            yield {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5].strip())}


def differences(digits: int, count: int = SUMS, seed: int = SEED) -> Iterator[Doc]:
    """What is a minus b? Both uniform below 10^digits."""
    drawn = random.Random(f"{seed} {digits}")
    for _ in range(count):
        a, b = drawn.randrange(10**digits), drawn.randrange(10**digits)
        yield {"context": f"Q: What is {a} minus {b}?\n\nA:", "completion": f" {a - b}"}


SOURCES = {
    "truthfulqa_mc1": Source("truthfulqa/truthfulqa_mc1.yaml", "validation", truthfulqa, "TruthfulQA.csv"),
    "truthfulqa_mc2": Source("truthfulqa/truthfulqa_mc2.yaml", "validation", truthfulqa, "TruthfulQA.csv"),
    "blimp_causative": Source("blimp/causative.yaml", "train", blimp, "blimp_causative.jsonl"),
    "mmlu_global_facts": Source(
        "mmlu/default/mmlu_global_facts.yaml",
        "test",
        mmlu,
        "mmlu_global_facts_test.csv",
        solved="mmlu_global_facts_dev.csv",
    ),
    "arithmetic_2ds": Source("arithmetic/arithmetic_2ds.yaml", "validation", differences, digits=2),
    "arithmetic_4ds": Source("arithmetic/arithmetic_4ds.yaml", "validation", differences, digits=4),
}
