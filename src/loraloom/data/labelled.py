"""Rows with labels to token ids: the other half of `prepare`, for classification.

    found = prepare_labels(DataConfig(train="tweets.csv"), tokenizer, model_max_length=512)
    found.train[0].ids, found.train[0].label, found.report.labels

Texts are written as the tokenizer itself writes a text or a pair, with its special tokens. Nothing is cut unless
data.too_long says so, and then by the tokenizer, which keeps its special tokens.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..config import DataConfig, Source
from .examples import Draft
from .glue import on_hub, task_named
from .label_examples import LabelledExamples
from .label_report import LabelReport
from .labels import Columns, Labels, find_columns, is_missing, labels_of
from .pipeline import chunks, empty
from .problems import Problems
from .report import Issue, SourceReport, gather, statistics
from .select import check_lost, choose_max_length, set_aside, too_long, without_leaks
from .sources import Place, is_hub, sources_of, tables_of


@dataclass
class LabelDraft(Draft):
    """An example while it is sorted out; `texts` are kept for cutting."""

    types: bytes = b""
    label: float = 0.0
    texts: tuple[str, str | None] = ("", None)


@dataclass(frozen=True)
class Labelled:
    """The training set, the validation set (which may be empty) and what was found on the way."""

    train: LabelledExamples
    eval: LabelledExamples
    report: LabelReport


@dataclass
class Read:
    """The rows of one source: (place, text, pair, label) of each."""

    place: Place
    columns: Columns
    unused: list[str]
    count: int
    items: list[tuple[str, str, str | None, Any]] = field(default_factory=list)


def places_of(config: DataConfig, *, offline: bool = False) -> list[Place]:
    """The sources of a run with labels; a GLUE task brings its validation split."""
    tasks = [task_named(source.path) for source in config.train]
    glue = next((at for at, task in enumerate(tasks) if task is not None), None)
    named = config.model_copy(update={"train": [on_hub(source) for source in config.train]})
    places = sources_of(named, offline=offline)
    if glue is not None and not isinstance(config.eval, str) and config.eval:
        held_out = tasks[glue].held_out  # type: ignore[union-attr]
        source = named.train[glue].model_copy(update={"split": held_out, "repeat": 1})
        places.append(Place(source, "eval", f"{source.path}[{held_out}]", offline))
    return places


def check_labelled_sources(config: DataConfig, *, offline: bool = False) -> None:
    """Look whether every source that needs no network is there, before anything expensive is done.

    raises  DataError if one is not, or there is no such GLUE task
    """
    for place in places_of(config, offline=offline):
        place.check()


def glue_task(config: DataConfig) -> Any:
    """The GLUE task of a run, or None."""
    return next(filter(None, (task_named(source.path) for source in config.train)), None)


def prepare_labels(
    config: DataConfig,
    tokenizer: Any,
    *,
    model_max_length: int,
    seed: int = 0,
    offline: bool = False,
    progress: bool = True,
) -> Labelled:
    """Read, tokenise, select: what `prepare` does for text.

    raises  DataError for everything that is wrong with the data
    """
    sources = read_all(places_of(config, offline=offline), config)
    values = [
        (row, label) for source in sources if source.place.use == "train" for row, *_, label in source.items
    ]
    task = glue_task(config)
    wanted = (
        config.labels if task is None or config.labels != "auto" else "classes" if task.classes else "numbers"
    )
    labels = labels_of(values, wanted)
    issues: list[Issue] = []
    drafts = drafts_of(sources, labels, tokenizer, issues, progress=progress)
    return select(sources, drafts, labels, config, tokenizer, issues, model_max_length, seed)


def read_file(
    path: str,
    config: DataConfig,
    labels: Labels,
    tokenizer: Any,
    *,
    model_max_length: int,
    offline: bool = False,
) -> tuple[LabelledExamples, list[Issue]]:
    """The rows of one more file with labels that are known; what is too long for the model is left out, and said.

    raises  DataError for rows without a text or with another label
    """
    if task_named(path) is not None:
        found = places_of(DataConfig(train=[Source(path=path)]), offline=offline)
    else:
        found = places_of(config.model_copy(update={"eval": path}), offline=offline)
    places = [place for place in found if place.use == "eval"]
    issues: list[Issue] = []
    drafts = drafts_of(read_all(places, config), labels, tokenizer, issues, progress=False)
    kept = limit(
        drafts, config.model_copy(update={"too_long": "drop"}), model_max_length, tokenizer, issues, 0
    )
    if not kept:
        raise empty(issues, len(drafts))
    return LabelledExamples.build(kept), issues


def read_all(places: Sequence[Place], config: DataConfig) -> list[Read]:
    """Every source's rows with their columns; `limit` counts the training rows of all together.

    raises  DataError with the rows that have no text or no label
    """
    problems, found = Problems(), []
    for place, table in tables_of(places, config):
        columns = find_columns(table, config.map)
        used = columns.to_dict().values()
        read = Read(place, columns, [name for name in table.columns if name not in used], len(table.rows))
        for row in table.rows:
            text, label = row.fields.get(columns.text), row.fields.get(columns.label)
            pair = row.fields.get(columns.pair) if columns.pair else None
            if (
                not isinstance(text, str)
                or not isinstance(pair, str | None)
                or (columns.pair and pair is None)
            ):
                problems.add(
                    "no text", f"{row.where}: {columns.text if not isinstance(text, str) else columns.pair}"
                )
            elif is_missing(label):
                problems.add("no label", f"{row.where}: {columns.label} is empty")
            else:
                read.items.append((row.where, text, pair, label))
        found.append(read)
    names = ", ".join(dict.fromkeys(place.source.path for place in places))
    problems.stop(names, "put these rows right, or take them out; columns are named by data.map")
    return found


def drafts_of(
    sources: Sequence[Read], labels: Labels, tokenizer: Any, issues: list[Issue], *, progress: bool
) -> list[LabelDraft]:
    """Every row with a text as a draft; the others go to `issues`.

    raises  DataError for rows whose label does not occur in training
    """
    problems = Problems()
    rows_ = [(at, *item) for at, source in enumerate(sources) for item in source.items]
    drafts: list[LabelDraft] = []
    for chunk in chunks(rows_, shown=progress):
        some = []
        for at, where, text, pair, label in chunk:
            value = labels.value(label)
            if value is None:
                problems.add("a label that training does not have", f"{where}: {label!r}")
            elif not text.strip() or (pair is not None and not pair.strip()):
                issues.append(Issue(where, "empty text", "nothing to classify"))
            else:
                some.append((at, where, text, pair, value))
        for (at, where, text, pair, value), (ids, types) in zip(
            some, encode(tokenizer, [(t, p) for _, _, t, p, _ in some])
        ):
            trained, span = bytearray(len(ids)), (0, len(ids))
            drafts.append(
                LabelDraft(
                    array("i", ids), trained, where, span, at, types=types, label=value, texts=(text, pair)
                )
            )
    problems.stop("labels", f"the labels are {', '.join(labels.names[:20]) or 'numbers'}")
    return drafts


def encode(
    tokenizer: Any, texts: Sequence[tuple[str, str | None]], max_length: int | None = None
) -> Iterator[tuple[list[int], bytes]]:
    """(ids, types) of texts or pairs as the tokenizer writes them; cut to max_length if that is given.

    Pairs and single texts may stand side by side: each kind goes to the tokenizer by itself.
    """
    cut: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
    told = "token_type_ids" in tokenizer.model_input_names
    found: dict[int, tuple[list[int], bytes]] = {}
    for paired in (False, True):
        where = [at for at, (_, pair) in enumerate(texts) if (pair is not None) == paired]
        if not where:
            continue
        given = [[texts[at][0] for at in where]] + ([[texts[at][1] for at in where]] if paired else [])
        out = tokenizer(*given, return_token_type_ids=told, verbose=False, **cut)
        types = out["token_type_ids"] if told else [[]] * len(where)
        found |= {at: (ids, bytes(kind)) for at, ids, kind in zip(where, out["input_ids"], types)}
    return (found[at] for at in range(len(texts)))


def select(
    sources: Sequence[Read],
    drafts: list[LabelDraft],
    labels: Labels,
    config: DataConfig,
    tokenizer: Any,
    issues: list[Issue],
    model_max_length: int,
    seed: int,
) -> Labelled:
    """Drop duplicates, hold the length, set the validation rows aside and repeat sources.

    raises  DataError if nothing is left, or more is lost than data.max_lost allows
    """
    read = sum(source.count for source in sources)
    use = [source.place.use for source in sources]
    train, held = (
        distinct([draft for draft in drafts if use[draft.source] == side], config.duplicates, issues)
        for side in ("train", "eval")
    )
    train = without_leaks(train, held, issues)  # type: ignore[assignment]
    if not train:
        check_lost(config, issues, read, 0, model_max_length, documents=False)
        raise empty(issues, read)
    lengths = [len(draft.ids) for draft in train]
    max_length, origin = choose_max_length(config, lengths, model_max_length)
    train, held = (
        limit(side, config, max_length, tokenizer, issues, model_max_length) for side in (train, held)
    )
    check_lost(config, issues, read, max(lengths), model_max_length, documents=False)
    kept = Counter(draft.source for draft in (*train, *held))
    notes: list[str] = []
    if "eval" not in use:
        assert not isinstance(config.eval, str)
        train, held = set_aside(train, config.eval, seed, notes)  # type: ignore[assignment]
    elif not held:
        notes.append("no validation set: none of its rows is left")
    train = [draft for draft in train for _ in range(sources[draft.source].place.source.repeat)]
    if not train:
        raise empty(issues, read)
    sides = LabelledExamples.build(train), LabelledExamples.build(held)
    report = LabelReport(
        sources=[report_of(source, kept[at]) for at, source in enumerate(sources)],
        problems=gather(issues),
        read=read,
        labels=list(labels.names),
        counts={side: counts(each.labels, labels) for side, each in zip(("train", "held out"), sides)},
        columns=sources[0].columns.to_dict(),
        lengths=statistics(lengths),
        max_length=max_length,
        max_length_origin=origin,
        too_long=config.too_long,
        train=len(train),
        eval=len(held),
        tokens=sum(len(draft.ids) for draft in train),
        notes=notes,
        issues=list(issues),
    )
    return Labelled(*sides, report)


def report_of(source: Read, kept: int) -> SourceReport:
    given = source.place.source
    return SourceReport(
        path=given.path,
        split=given.split if is_hub(given) else None,
        use=source.place.use,
        format="labels",
        columns=source.columns.to_dict(),
        guessed=False,
        unused=source.unused,
        repeat=given.repeat,
        read=source.count,
        kept=kept,
    )


def counts(values: Tensor, labels: Labels) -> dict[str, Any]:
    """How many rows have each label; of numbers their mean and range."""
    if not labels.numbers:
        found = Counter(int(value) for value in values)
        return {name: found.get(number, 0) for number, name in enumerate(labels.names)}
    if not len(values):
        return {}
    return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}


def distinct(drafts: Sequence[LabelDraft], mode: str, issues: list[Issue]) -> list[LabelDraft]:
    """Without rows that have the text and the label of an earlier one; the same text with another label is said."""
    seen: dict[bytes, LabelDraft] = {}
    kept = []
    for draft in drafts:
        earlier = seen.setdefault(draft.ids.tobytes() + draft.types, draft)
        if earlier is not draft and earlier.label != draft.label:
            issues.append(
                Issue(draft.row, "another label for the same text", f"the same text as {earlier.row}")
            )
        elif earlier is not draft:
            kind = "duplicate" if mode == "drop" else "duplicate, kept"
            issues.append(Issue(draft.row, kind, f"the same as {earlier.row}"))
            if mode == "drop":
                continue
        kept.append(draft)
    return kept


def limit(
    drafts: Sequence[LabelDraft],
    config: DataConfig,
    max_length: int,
    tokenizer: Any,
    issues: list[Issue],
    model_max_length: int,
) -> list[LabelDraft]:
    """Drop, cut or refuse what is over `max_length`, as data.too_long says.

    raises  DataError if it says error, or split, which no labelled text can be
    """
    long = [draft for draft in drafts if len(draft.ids) > max_length]
    if long and config.too_long in ("error", "split"):
        why = "" if config.too_long == "error" else "; a text with a label cannot be split"
        raise too_long(long, max_length, model_max_length, why)
    cut = config.too_long == "truncate"
    short = (
        dict(zip(map(id, long), encode(tokenizer, [draft.texts for draft in long], max_length)))
        if cut
        else {}
    )
    kept = []
    for draft in drafts:
        if len(draft.ids) > max_length:
            said = f"{len(draft.ids):,} tokens, max_length is {max_length:,}"
            issues.append(Issue(draft.row, "cut" if cut else "too long", said))
            if not cut:
                continue
            ids, draft.types = short[id(draft)]
            draft.ids = array("i", ids)
        if draft.ids:
            kept.append(draft)
    return kept
