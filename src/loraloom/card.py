"""The model card of a run, README.md: what a stranger must know before using the adapter.

The front matter is what Hugging Face reads; a base model that was a local folder is not named there, since its
path means nothing to anybody else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .adapter_files import is_adapter_folder, is_peft_folder
from .config import shown_alpha
from .results import Result, evaluations, result
from .rundir import Run
from .wording import MISSING, amount, day, duration, number, percent, plural

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
SETTINGS = (  # those that somebody who repeats the run asks for first
    "train.epochs",
    "train.learning_rate",
    "train.schedule",
    "train.warmup",
    "train.batch_size",
    "train.batch_tokens",
    "train.optimizer",
    "train.weight_decay",
    "train.seed",
    "data.prompt",
    "data.loss_on",
    "data.max_length",
)

OF_TEXT = ("data.prompt", "data.loss_on")


def model_card(run: Run) -> str:
    """The text of README.md: front matter, use, data, result, settings, versions, limits."""
    outcome = result(run)
    parts = [
        front_matter(run),
        f"# {line(run.name)}",
        opening(run, outcome),
        use(run),
        "## Data\n\n" + data(run),
        "## Result\n\n" + results(run, outcome),
        "## Settings\n\n" + settings_table(run),
        "## Versions\n\n" + versions(run),
        "## Limits\n\n" + limits(run, outcome),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def hub_base(run: Run) -> str | None:
    """The base's Hugging Face id, or None if it was a folder or a file."""
    name = run.config.model.id
    local = run.env.get("base_is_folder")
    if local is None:
        local = Path(name).exists()
    return name if HUB_ID.fullmatch(name) and not local and not name.endswith(".gguf") else None


def front_matter(run: Run) -> str:
    """The YAML head."""
    base = hub_base(run)
    head: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter"} if base else {}
    library = "loraloom" if only_ours(run) else "peft"
    head |= {
        "library_name": library,
        "pipeline_tag": "text-classification" if labelled(run) else "text-generation",
    }
    head["tags"] = list(dict.fromkeys(["lora", str(run.config.method.get("name", "lora")), "loraloom"]))
    sets = [
        source.path.removeprefix("hf:") for source in run.config.data.train if source.path.startswith("hf:")
    ]
    if sets:
        head["datasets"] = list(dict.fromkeys(sets))
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}\n---"


def labelled(run: Run) -> bool:
    return run.config.task == "classification"


def opening(run: Run, outcome: Result) -> str:
    config = run.config
    base = code(hub_base(run) or Path(config.model.id).name)
    alpha = shown_alpha(config)
    kind = line(str(config.method.get("name", "lora")))
    text = f"A low-rank adapter ({kind}, r {config.r}, alpha {alpha}) for {base}"
    if outcome.trainable and outcome.total:
        share = percent(outcome.trainable / outcome.total)
        text += f", with {amount(outcome.trainable)} trained of {amount(outcome.total)} weights ({share})"
    status = {"done": "", "stopped_early": " Training stopped early, at its best held-out loss."}
    ending = status.get(outcome.status, f" **Training did not finish: {line(outcome.status)}.**")
    return f"{text}.{ending}"


def use(run: Run) -> str:
    """How to load it; only where the base can be named."""
    base = hub_base(run)
    if base is None:
        return ""
    revision = run.config.model.revision
    if labelled(run):
        return use_of_labels(run, base)
    pinned = f", revision={revision!r}" if revision else ""
    if only_ours(run):
        return f"""```python
import loraloom
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r}{pinned})
adapters = loraloom.load_adapter(model, "path/to/adapter")
```"""
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r}{pinned})
model = PeftModel.from_pretrained(model, "path/to/adapter")
```"""


def use_of_labels(run: Run, base: str) -> str:
    names = (run.read("data/manifest.json", None) or {}).get("labels") or []
    revision = run.config.model.revision
    more = f", revision={revision!r}" if revision else ""
    if only_ours(run):
        return f"`loraloom merge {run.name} OUT` makes a model that transformers loads."
    return f"""```python
from peft import PeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification

labels = {names!r}  # the outputs in their order; none: one number
model = AutoModelForSequenceClassification.from_pretrained({base!r}{more}, num_labels={len(names) or 1})
model = PeftModelForSequenceClassification.from_pretrained(model, "path/to/adapter")
```"""


def only_ours(run: Run) -> bool:
    """Whether PEFT cannot load the adapter, having no such method."""
    return is_adapter_folder(run.adapter_path) and not is_peft_folder(run.adapter_path)


def data(run: Run) -> str:
    manifest = run.read("data/manifest.json", None) or {}
    lines = [f"- {code(public(source.path))}" for source in run.config.data.train]
    read, kept = manifest.get("read"), manifest.get("kept")
    if isinstance(read, int) and isinstance(kept, int):
        lines.append(f"- {number(kept)} of {plural(read, 'row')} used")
    if isinstance(manifest.get("target_share"), float):
        lines.append(f"- {percent(manifest['target_share'])} of the tokens carry loss")
    return "\n".join(lines)


def public(path: str) -> str:
    """A data set as others know it: an id whole, a file without its folders."""
    return path.removeprefix("hf:") if path.startswith("hf:") else Path(path).name


def results(run: Run, outcome: Result) -> str:
    """Base beside tuned: the newest evaluation, or the held-out losses of training."""
    tables = evaluations(run)
    if tables:
        sides = ["constant", "base", "tuned"] if labelled(run) else ["base", "tuned"]
        rows = [
            [row.get("metric"), *(value(row.get(side)) for side in sides), row.get("verdict")]
            for row in tables[-1]["rows"]
        ]
        note = "± is one standard error over held-out examples."
        if labelled(run):
            note += " Constant: the answer that does not read the text, which the verdict is against."
            note += " Base: the head as it was drawn."
        return table(["metric", *sides, "verdict"], rows) + f"\n\n{note}"
    if outcome.best_loss is None:
        return "Not measured."
    loss = "held-out loss" if labelled(run) else "held-out loss, nats per token"
    rows = [[loss, number(outcome.base_loss), number(outcome.best_loss)]]
    return table(["metric", "base", "tuned"], rows)


def value(cell: Any) -> str:
    found, error = (cell.get("value"), cell.get("stderr")) if isinstance(cell, dict) else (cell, None)
    return number(found) + (f" ± {number(float(error), 2)}" if found is not None and error else "")


def settings_table(run: Run) -> str:
    config = run.config
    modules = config.target_modules
    rows: list[list[Any]] = [
        ["method", config.method.get("name", "lora")],
        ["r", config.r],
        ["alpha", shown_alpha(config)],
        ["dropout", f"{config.dropout:g}"],
        [Code("target_modules"), modules if isinstance(modules, str) else ", ".join(modules)],
    ]
    for name in SETTINGS:
        section, key = name.split(".")
        if labelled(run) and name in OF_TEXT:
            continue
        found = getattr(getattr(config, section), key)
        if found is not None:
            rows.append([Code(name), f"{found:g}" if isinstance(found, float) else found])
    return table(["setting", "value"], rows)


def versions(run: Run) -> str:
    env, state = run.env, run.state
    names = [
        f"{name} {env[name]}" for name in ("loraloom", "torch", "transformers", "python") if env.get(name)
    ]
    took = f" in {duration(state['seconds'])}" if state.get("seconds") is not None else ""
    where = env.get("device_name") or env.get("device")
    trained = f"Trained{took}{f' on {line(str(where))}' if where else ''}, begun {day(state.get('started'))}."
    return f"{', '.join(names)}. {trained}"


def limits(run: Run, outcome: Result) -> str:
    """What this card does not claim, from what was and was not measured."""
    lines = ["- Measured only on held-out rows of the data above; nothing is claimed about other text."]
    failed = [str(check.get("name")) for check in run.checks() if not check.get("ok")]
    lines += [f"- **These checks failed: {line(', '.join(failed))}.**"] if failed else []
    best, base = outcome.best_loss, outcome.base_loss
    if best is not None and base is not None and best >= base:
        lines.append("- **The held-out loss is no better than the base's.**")
    lines.append("- What the base model gets wrong, or may not be used for, holds for this adapter too.")
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *([cell_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


class Code(str):
    """Text that stands in a table as code."""


def cell_text(cell: Any) -> str:
    if isinstance(cell, Code):
        return code(cell)
    return MISSING if cell is None else line(str(cell))


def line(text: str) -> str:
    """A user's text as one line of Markdown, with what Markdown or HTML would read escaped."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """A name as code; it may hold anything but a grave accent."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"
