"""The README tells the truth: its tree is the tree, its Python runs, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tree_names_every_file_of_the_package():
    (tree,) = re.findall(r"```text\nsrc/loraloom/\n(.*?)```", TEXT, re.DOTALL)
    named = set(re.findall(r"[\w/]+\.py", tree))
    named = {name.rpartition("/")[2] for name in named}
    there = {path.name for path in (ROOT / "src" / "loraloom").rglob("*.py") if path.name != "__init__.py"}
    assert named == there


def test_its_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
