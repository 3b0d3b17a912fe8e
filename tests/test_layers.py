"""The house holds: imports go down, each heavy dependency has one door, files stay small.

Read from the import statements, so that nothing is executed.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "loraloom"
MOST_LINES = 460  # a file; about 300 is the aim
MOST_FUNCTION = 66  # lines of a function, its docstring included: the training step is the longest

# Each line may import from the lines above it; within a line only what stands to the left.
LAYERS = [
    ["errors", "files", "config_errors", "config_sections", "config"],
    ["wording", "environment", "noise", "metrics", "progress", "beside", "text_metrics"],
    ["kernels"],
    [
        "weights8",
        "quant",
        "products8",
        "layers",
        "fused",
        "packing",
        "padded",
        "prefetch",
        "attention",
        "paging",
    ],
    ["optim8", "optim", "data"],
    ["methods"],
    ["targets", "casts", "flow", "bank", "overlay", "forwards", "merging", "adapter", "refusals", "making"],
    ["adapt", "dressing", "head", "nll"],
    ["frozen", "group", "decoder", "likeness", "fast"],
    [
        "adapter_files",
        "peft_types",
        "peft_config",
        "peft_tensors",
        "peft_format",
        "adapter_fill",
        "adapter_io",
    ],
    ["model_files", "shards", "gguf_model", "gguf_tokenizer", "pretrained", "disk_names"],
    ["convert_sources", "convert"],
    ["devices", "small_model", "hub", "on_load", "incoming", "bnb_format", "model"],
    ["trace", "skeleton", "recompute", "facts"],
    ["classifier", "generate", "heldout", "rundir", "conversation"],
    [
        "step",
        "originals",
        "prepare",
        "compiling",
        "graph_shapes",
        "graphs",
        "opening",
        "workshop",
        "samples",
        "checkpoint",
        "task",
        "classifying",
        "train",
    ],
    ["sdpa", "shapes", "workload", "memory", "oom", "fit", "plan", "doctor"],
    ["merge_table", "merge", "analysis", "deltas", "bare", "spectra"],
    [
        "results",
        "figures",
        "curves",
        "verdict",
        "card",
        "sections",
        "comparison",
        "heatmaps",
        "inspect_page",
        "report",
    ],
    [
        "evaluate_labels",
        "evaluate",
        "tasks",
        "scores",
        "harness",
        "verify",
        "merge_check",
        "quantize_files",
        "chat",
        "finish",
        "look",
        "use",
        "benchmark",
        "fold",
        "api",
        "inspection",
        "eval_verb",
    ],
    [
        "console",
        "study_file",
        "study_table",
        "study_data",
        "study_tasks",
        "study_plan",
        "study_figures",
        "study_page",
    ],
    ["study_run", "study", "latency"],
    ["verbs", "cli_study", "cli_inspect", "cli", "__main__"],
]
PACKAGES = {
    "kernels",
    "methods",
    "data",
}  # folders; inside them files import each other as they like, without circles

DOORS = {
    "transformers": {"pretrained", "convert_sources", "on_load", "model", "skeleton"},
    "tokenizers": {"gguf_tokenizer"},
    "gguf": {"gguf_model"},
    "datasets": {"data"},
    "lm_eval": {"harness"},
    "pyarrow": {"data"},
    "matplotlib": {"figures"},
    "jinja2": {"report"},
    "triton": {"kernels"},
    "sacrebleu": {"text_metrics"},
    "nltk": {"text_metrics"},
    "pycocoevalcap": {"text_metrics"},
    "sqlglot": {"text_metrics"},
    "click": {"cli", "cli_inspect", "cli_study", "verbs"},
    "peft": set(),
    "bitsandbytes": set(),
}
NO_TORCH = {
    "errors",
    "files",
    "config_errors",
    "config",
    "wording",
    "environment",
    "noise",
    "text_metrics",
    "rundir",
    "results",
    "card",
    "heatmaps",
    "inspect_page",
    "verbs",
    "cli_inspect",
    "cli_study",
    "study_file",
    "study_table",
    "cli",
    "console",
}


def files() -> list[Path]:
    return sorted(
        path for path in SOURCE.rglob("*.py") if path.name != "__init__.py" or path.parent != SOURCE
    )


def unit(path: Path) -> str:
    """The name that LAYERS knows a file by: its own, or its folder's."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path, *, top_only: bool = False) -> list[tuple[str, bool]]:
    """(module, whether it is ours) of each import; ours by the name that LAYERS knows."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else list(ast.walk(tree))
    depth = len(path.relative_to(SOURCE).parts)  # 1 for a file of the package, 2 for one in a folder
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(((node.module or "").split(".")[0], False))
        elif isinstance(node, ast.ImportFrom):
            if node.level < depth:  # from . inside a folder
                found.append((unit(path), True))
            elif node.module:
                found.append((node.module.split(".")[0], True))
            else:
                found += [(alias.name, True) for alias in node.names]
    return found


def place(name: str) -> tuple[int, int]:
    for line, names in enumerate(LAYERS):
        if name in names:
            return line, names.index(name)
    raise AssertionError(f"{name} stands in no layer: put it in LAYERS")


def test_every_file_stands_in_one_layer():
    names = {unit(path) for path in files()}
    listed = [name for names in LAYERS for name in names]
    assert sorted(listed) == sorted(set(listed))
    assert names == set(listed)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path):
    own = unit(path)
    for name, ours in imports(path):
        if ours and name != "__version__" and not (name == own and own in PACKAGES):
            assert place(name) < place(own), f"{own} imports {name}, which stands above it"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_each_heavy_dependency_has_one_door(path):
    for name, ours in imports(path):
        if not ours and name in DOORS:
            assert unit(path) in DOORS[name], f"{unit(path)} imports {name}"


@pytest.mark.parametrize("name", sorted(NO_TORCH))
def test_what_must_be_quick_imports_no_torch(name):
    assert "torch" not in {module for module, _ in imports(SOURCE / f"{name}.py", top_only=True)}


def test_only_the_step_calls_backward():
    """Elsewhere only `hold` brings a gradient back, and the first look at a machine tries one."""
    allowed = {"step.py", "prepare.py", "adapt.py", "flow.py", "bank.py", "doctor.py"}
    for path in files():
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and node.attr == "backward"
        ]
        assert not calls or path.name in allowed, path.name


def test_files_and_functions_stay_small():
    for path in files():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= MOST_LINES, f"{path.name} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < MOST_FUNCTION, f"{path.name}: {node.name} is too long"
