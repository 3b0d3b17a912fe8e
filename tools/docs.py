"""Write the pages that are generated from the code; --check fails if one is stale.

docs/reference/settings.md   every setting, from the schema
docs/reference/commands.md   every command's --help
docs/reference/methods.md    every method and its own settings, from the files in methods/
README.md                    the table of one training step, between its two marks
docs/qlora.md                tables of what was measured, between their marks (tables.py)
docs/methods.md              the same of the family (method_tables.py), and its picture (method_figure.py)
docs/speed.md                the same of speed beside other tools (speed_tables.py)
docs/studies.md              the studies that ship, and those that were made (study_tables.py)
"""

import re
import subprocess
import sys
from pathlib import Path

import click
import method_tables
import speed_tables
import study_tables
from method_figure import loss_figure
from tables import filled

from loraloom import methods
from loraloom.cli import cli
from loraloom.config import describe
from loraloom.methods.base import options_of

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"


def settings_page() -> str:
    lines = ["# Settings", "", "Generated from `src/loraloom/config.py` by `make docs`.", ""]
    lines += ["| setting | default | meaning |", "| --- | --- | --- |"]
    for name, default, text in describe():
        lines.append(f"| `{name}` | `{default}` | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    lines = ["# Commands", "", "Generated from `src/loraloom/cli.py` by `make docs`.", ""]
    context = click.Context(cli, info_name="loraloom", max_content_width=100, terminal_width=100)
    lines += ["```text", cli.get_help(context).rstrip(), "```", ""]
    for name, command in cli.commands.items():
        below = click.Context(
            command, info_name=name, parent=context, max_content_width=100, terminal_width=100
        )
        lines += [f"## {name}", "", "```text", command.get_help(below).rstrip(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def methods_page() -> str:
    lines = ["# Methods", "", "Generated from the files in `src/loraloom/methods/` by `make docs`.", ""]
    for name in methods.names():
        kind = methods.find(name)
        text = (sys.modules[kind.__module__].__doc__ or "").strip()
        lines += [
            f"## {name}",
            "",
            "```text",
            text,
            "```",
            "",
            f"Default learning rate {kind.learning_rate:g}: {kind.rate_source}.",
            f"Default r {kind.r}, alpha {kind.alpha:g}." if kind.ranked else "",
            "",
        ]
        for option, meaning in options_of(kind).items():
            lines.append(f"- `method.{option}`: {meaning}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def readme() -> str:
    """The README with the output of examples/one_step.py between its marks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "one_step.py"], capture_output=True, text=True, check=True
    )
    block = f"<!-- one step -->\n```text\n{done.stdout.rstrip()}\n```\n<!-- end -->"
    return re.sub(r"<!-- one step -->.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL)


def main() -> int:
    pages = {
        REFERENCE / "settings.md": settings_page(),
        REFERENCE / "commands.md": commands_page(),
        REFERENCE / "methods.md": methods_page(),
        ROOT / "README.md": readme(),
        ROOT / "docs" / "qlora.md": filled((ROOT / "docs" / "qlora.md").read_text(encoding="utf-8")),
        ROOT / "docs" / "methods.md": filled(
            (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), method_tables.TABLES
        ),
        ROOT / "docs" / "studies.md": filled(
            (ROOT / "docs" / "studies.md").read_text(encoding="utf-8"), study_tables.TABLES
        ),
        ROOT / "docs" / "speed.md": filled(
            (ROOT / "docs" / "speed.md").read_text(encoding="utf-8"), speed_tables.TABLES
        ),
    }
    if (study := method_tables.measured(method_tables.STUDY)) is not None:
        pages[ROOT / "docs" / "methods-loss.svg"] = loss_figure(study)
    stale = [
        path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        for path in stale:
            print(f"stale: {path.relative_to(ROOT)}; run `make docs`")
        return 1 if stale else 0
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"{len(stale)} of {len(pages)} pages changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
