"""Small files in the formats of the six tasks' data, made up: no benchmark's own items stand in tests."""

from __future__ import annotations

import csv
import json
from pathlib import Path

COLUMNS = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]


def make_task_files(folder: Path, items: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "TruthfulQA.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for i in range(items):
            right = f"It is {i} of them; They are {i}"
            wrong = "; ".join(f"It is {i + k}" for k in range(1, 3 + i % 3)) + ";"
            table.writerow(
                ["Plain", "Sums", f"How many, if there are {i}?", f"It is {i} of them", right, wrong, ""]
            )
    with (folder / "blimp_causative.jsonl").open("w") as file:
        for i in range(items):
            pair = {"sentence_good": f"Ann moved {i} cups.", "sentence_bad": f"Ann rose {i} cups."}
            file.write(json.dumps(pair | {"UID": "causative"}) + "\n")
    for part, count in (("test", items), ("dev", 3)):
        with (folder / f"mmlu_global_facts_{part}.csv").open("w", newline="") as file:
            for i in range(count):
                choices = [i, i + 1, i + 2, i + 3]
                csv.writer(file).writerow([f"{part}: what is {i} and 2?", *choices, "ABCD"[i % 4]])
    return folder
