"""Run every command of the README and of five pages of docs/, in order, as a reader would type it.

Blocks marked ```console hold lines that begin with `$ `; lines that a backslash continues belong together. Those
that make environments (make demo, make test) are run by CI before; every other one is run here.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/evaluate.md",
    "docs/analysis.md",
    "docs/studies.md",
    "docs/qlora.md",
    "docs/methods.md",
)
BEFORE = ("make demo", "make test")  # run by .ci/run itself


def commands(text: str) -> list[str]:
    found = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        joined = block.replace("\\\n", " ")
        found += [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]
    return found


def main() -> int:
    todo = [
        command
        for page in PAGES
        for command in commands((ROOT / page).read_text(encoding="utf-8"))
        if command not in BEFORE
    ]
    if not todo:
        print("the README has no commands")
        return 1
    env = os.environ | {"PATH": f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    made = [f"{top}/{run}" for top in ("runs", "out") for run in ("first", "nf4")]
    subprocess.run(["rm", "-rf", *made], cwd=ROOT, check=True)
    for command in todo:
        print(f"$ {command}", flush=True)
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, stdin=subprocess.DEVNULL)
        if done.returncode:
            print(f"README command failed with {done.returncode}: {command}")
            return 1
    print(f"{len(todo)} README commands ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
