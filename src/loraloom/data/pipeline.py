"""Files to examples: read, see the shape, write prompts, tokenise, select, report."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..config import DataConfig
from ..errors import DataError
from ..progress import counted, nothing
from . import cache as store
from .examples import Draft, Examples
from .report import DataReport, Issue, gather, statistics
from .select import check_lost, choose_max_length, deduplicate, limit_length, set_aside, without_leaks
from .sources import ReadSource, fingerprint, read_all, sources_of
from .template import Style, Writer, resolve_style
from .tokens import Encoded, encode_scripts, first_tokens
from .turns import Conversation, Dropped

CHUNK = 256  # rows tokenised in one call
T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """The training set, the validation set (which may be empty) and what was found on the way."""

    train: Examples
    eval: Examples
    report: DataReport


def check_sources(config: DataConfig, *, offline: bool = False) -> None:
    """Look whether every source that needs no network is there, before anything expensive is done.

    raises  DataError if one is not
    """
    for place in sources_of(config, offline=offline):
        place.check()


def prepare(
    config: DataConfig,
    tokenizer: Any,
    *,
    model_max_length: int,
    seed: int = 0,
    cache: Path | None = None,
    offline: bool = False,
    progress: bool = True,
    each: Callable[[], None] = nothing,
) -> Prepared:
    """Read the data, and tokenise it with its loss mask.

    tokenizer         of transformers
    model_max_length  the most tokens that the model takes
    seed              of the split into training and validation
    cache             a folder for prepared data; the same files and settings are then not tokenised again
    offline           take Hugging Face sets from their cache, and make no request
    progress          show a bar on stderr, if that is a terminal
    each              called before each piece of work; what it raises ends it

    raises  DataError for everything that is wrong with the data; Failure if the cache cannot be written
    """
    places = sources_of(config, offline=offline)
    folder = None
    if cache is not None:
        settings = [config.model_dump(mode="json"), seed, model_max_length]
        folder = cache / store.key_of(settings, [fingerprint(place, config) for place in places], tokenizer)
        found = store.fetch(folder)
        if found is not None:
            return Prepared(*found)
    each()
    sources = read_all(places, config, each)
    each()
    formats = [source.shape.format for source in sources]
    style = resolve_style(config.prompt, config.system, tokenizer, formats)
    issues: list[Issue] = []
    drafts = tokenise(sources, config, tokenizer, style, issues, progress=progress, each=each)
    prepared = select(sources, drafts, config, tokenizer, style, issues, model_max_length, seed)
    if folder is not None:
        store.store(folder, prepared.train, prepared.eval, prepared.report)
    return prepared


def tokenise(
    sources: Sequence[ReadSource],
    config: DataConfig,
    tokenizer: Any,
    style: Style,
    issues: list[Issue],
    *,
    progress: bool,
    each: Callable[[], None] = nothing,
) -> list[Draft]:
    """Every row that has something to learn from as a draft; the others go to `issues`."""
    writer = Writer(tokenizer, style)
    rows = [(at, item) for at, source in enumerate(sources) for item in source.items]
    drafts: list[Draft] = []
    for chunk in chunks(rows, shown=progress, each=each):
        talks: list[tuple[int, Conversation]] = []
        for at, item in chunk:
            if isinstance(item, Dropped):
                issues.append(Issue(item.where, item.kind, item.detail))
            else:
                talks.append((at, item))
                issues += remarks(item, writer)
        scripts = [writer.example(talk, every=config.loss_on == "completion") for _, talk in talks]
        for (at, talk), encoded in zip(talks, encode_scripts(tokenizer, scripts)):
            drafts.append(draft_of(encoded, talk, at, config.loss_on))
    return drafts


def remarks(item: Conversation, writer: Writer) -> Iterator[Issue]:
    """What is odd about a row that is kept."""
    if item.trailing:
        yield Issue(item.where, "turns after the last answer", f"{item.trailing} left out")
    for turn in item.turns:
        found = writer.ends.search(turn.text) or writer.ends.search(turn.input)
        if found:
            yield Issue(item.where, "control token in the text", f"{found.group()} in a {turn.role} turn")
            return


def draft_of(encoded: Encoded, talk: Conversation, source: int, loss_on: str) -> Draft:
    """The example of a script, with the mask that `loss_on` asks for; the first token never carries loss."""
    size = len(encoded.ids)
    everything = loss_on == "all" or talk.document
    trained = bytearray([1]) * size if everything else bytearray(size)
    for span in encoded.spans[-1:] if loss_on == "last_turn" else encoded.spans:
        trained[span.start : span.stop] = bytes([1]) * (span.stop - span.start)
    trained[:1] = bytes(min(1, size))
    last = encoded.spans[-1]
    start = max(1, last.start) if talk.document else last.start
    ended = bool(last.end) and last.stop == size and bool(trained[-1])
    answer = (min(start, last.stop - last.end), last.stop - last.end)
    return Draft(array("i", encoded.ids), trained, talk.where, answer, source, talk.document, ended)


def select(
    sources: Sequence[ReadSource],
    drafts: list[Draft],
    config: DataConfig,
    tokenizer: Any,
    style: Style,
    issues: list[Issue],
    model_max_length: int,
    seed: int,
) -> Prepared:
    """Drop duplicates, hold the length, set the validation rows aside and repeat sources.

    raises  DataError if nothing is left, or more is lost than data.max_lost allows
    """
    read = sum(len(source.items) for source in sources)
    train, held = (
        deduplicate(
            [draft for draft in drafts if sources[draft.source].use == use], config.duplicates, issues
        )
        for use in ("train", "eval")
    )
    train = without_leaks(train, held, issues)
    if not train:
        check_lost(config, issues, read, 0, model_max_length, documents=False)
        raise empty(issues, read)
    lengths = [len(draft.ids) for draft in train]
    max_length, origin = choose_max_length(config, lengths, model_max_length)
    prefix = len(first_tokens(tokenizer))
    train, held = (
        limit_length(side, config, max_length, prefix, issues, model_max_length) for side in (train, held)
    )
    documents = all(draft.document for draft in drafts)
    check_lost(config, issues, read, max(lengths), model_max_length, documents)
    if not train:
        raise empty(issues, read)
    kept = Counter(draft.source for draft in (*train, *held) if draft.first)
    notes: list[str] = []
    if not isinstance(config.eval, str):
        train, held = set_aside(train, config.eval, seed, notes)
    elif not held:
        notes.append(f"no validation set: no row of {config.eval} is left")
    train = [draft for draft in train for _ in range(sources[draft.source].source.repeat)]
    unended = sum(not draft.ended for draft in train)
    if unended:
        notes.append(f"{unended:,} of {len(train):,} examples do not end in a trained end token")
    report = DataReport(
        sources=[source.report(kept[at]) for at, source in enumerate(sources)],
        problems=gather(issues),
        read=read,
        lengths=statistics(lengths),
        max_length=max_length,
        max_length_origin=origin,
        too_long=config.too_long,
        loss_on=config.loss_on,
        style=style.to_dict(),
        end_token=end_text(train, tokenizer),
        all_ended=not unended,
        train=len(train),
        eval=len(held),
        tokens=sum(len(draft.ids) for draft in train),
        targets=sum(draft.targets for draft in train),
        notes=notes,
        issues=list(issues),
    )
    return Prepared(Examples.build(train), Examples.build(held), report)


def end_text(drafts: Iterable[Draft], tokenizer: Any) -> str:
    """The end tokens that the examples end with, as text."""
    ids = {draft.ids[-1] for draft in drafts if draft.ended}
    return " ".join(sorted(map(str, tokenizer.convert_ids_to_tokens(sorted(ids)))))


def empty(issues: Sequence[Issue], read: int) -> DataError:
    """Nothing is left to train on: why."""
    counts = [
        f"{problem.count:,} {problem.kind}: {', '.join(problem.rows[:3])}" for problem in gather(issues)
    ]
    return DataError(
        f"nothing to train on: none of the {read:,} rows is left",
        details=counts,
        hint="put the rows right, or name another file",
    )


def chunks(rows: Sequence[T], *, shown: bool, each: Callable[[], None] = nothing) -> Iterator[Sequence[T]]:
    """The rows in pieces, with a bar on a terminal.

    each  called before each piece
    """
    with counted("tokenising", total=len(rows), shown=shown and len(rows) > CHUNK) as step:
        for start in range(0, len(rows), CHUNK):
            each()
            piece = rows[start : start + CHUNK]
            yield piece
            step("rows", len(piece))
