"""Files of examples to token ids with a loss mask, and a report of what was found.

    prepared = prepare(DataConfig(train="tickets.csv"), tokenizer, model_max_length=2048)
    prepared.train[0].ids, prepared.report.target_share

A row's way: `read` (rows with line numbers), `shapes` (which column is what), `turns` (every format becomes
a conversation), `template` (what is written for the model), `tokens` (ids and answers), `select`
(duplicates, lengths, validation set), `report`.
"""

from .display import preview, show
from .examples import IGNORED, Example, Examples
from .label_examples import LabelledExample, LabelledExamples
from .labelled import Labelled, prepare_labels
from .labels import Labels
from .pipeline import Prepared, check_sources, prepare
from .report import DataReport, Issue, Problem, SourceReport, length_histogram
from .template import Style, resolve_style
from .tokens import end_tokens, render_prompt
from .turns import Turn

__all__ = [
    "IGNORED",
    "DataReport",
    "Example",
    "Examples",
    "Issue",
    "Labelled",
    "LabelledExample",
    "LabelledExamples",
    "Labels",
    "Prepared",
    "Problem",
    "SourceReport",
    "Style",
    "Turn",
    "check_sources",
    "end_tokens",
    "length_histogram",
    "prepare",
    "prepare_labels",
    "preview",
    "render_prompt",
    "resolve_style",
    "show",
]
