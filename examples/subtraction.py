"""Two-digit subtraction as data: sums to train on, and 500 others to be tried on.

python examples/subtraction.py runs/subtraction
"""

import json
import random
import sys
from pathlib import Path

HELD_OUT = 500


def sums(seed: int = 0) -> list[tuple[int, int]]:
    """Every a - b with two digits each and a >= b, shuffled."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, a + 1)]
    random.Random(seed).shuffle(pairs)
    return pairs


def write(path: Path, pairs: list[tuple[int, int]]) -> None:
    rows = [
        {"prompt": f"Question: What is {a} minus {b}?\nAnswer:", "completion": f" {a - b}"} for a, b in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pairs = sums()
    write(folder / "held-out.jsonl", pairs[:HELD_OUT])
    write(folder / "train.jsonl", pairs[HELD_OUT:])
    print(f"{folder}: {len(pairs) - HELD_OUT:,} sums to train on, {HELD_OUT} others held out")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
