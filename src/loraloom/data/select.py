"""Which examples are kept, cut and set aside: duplicates, lengths and the validation set."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol

from ..config import DataConfig
from ..errors import DataError
from .examples import Draft
from .problems import first, rows
from .report import LOST, Issue, gather, percentile

SHARE = 0.995  # of the rows that max_length auto keeps whole
MULTIPLE = 8  # lengths that are multiples of it suit the kernels


def content(draft: Draft, *salt: int) -> bytes:
    """A digest of an example's ids: equal for duplicates, and without order."""
    key = ",".join(map(str, salt)).encode()
    return hashlib.blake2b(draft.ids.tobytes(), digest_size=16, key=key).digest()


def deduplicate(drafts: Sequence[Draft], mode: str, issues: list[Issue]) -> list[Draft]:
    """Drop, or only report, rows with the same ids as an earlier one."""
    seen: dict[bytes, str] = {}
    kept = []
    for draft in drafts:
        earlier = seen.setdefault(content(draft), draft.row)
        again = earlier is not draft.row
        if again:
            kind = "duplicate" if mode == "drop" else "duplicate, kept"
            issues.append(Issue(draft.row, kind, f"the same as {earlier}"))
        if mode == "keep" or not again:
            kept.append(draft)
    return kept


def choose_max_length(config: DataConfig, lengths: Sequence[int], model_max_length: int) -> tuple[int, str]:
    """(max_length, where it comes from).

    raises  DataError if the model cannot take the length that is set
    """
    if config.max_length != "auto":
        if config.max_length > model_max_length:
            raise DataError(
                f"data.max_length is {config.max_length:,}, and the model takes at most {model_max_length:,} tokens",
                hint=f"--set data.max_length={model_max_length} or less",
            )
        return config.max_length, "set"
    wanted = math.ceil(percentile(sorted(lengths), SHARE) / MULTIPLE) * MULTIPLE
    if wanted > model_max_length:
        return model_max_length, "auto: what the model takes"
    return wanted, "auto: the 99.5th percentile"


def limit_length(
    drafts: Sequence[Draft],
    config: DataConfig,
    max_length: int,
    prefix: int,
    issues: list[Issue],
    model_max_length: int,
) -> list[Draft]:
    """Drop, cut, split or refuse what is over `max_length`; drop what then has nothing to train on.

    prefix  tokens that begin every document, such as BOS

    raises  DataError if data.too_long is `error`, or `split` and a row that is no plain text is too long
    """
    long = [draft for draft in drafts if len(draft.ids) > max_length]
    refused = long if config.too_long == "error" else [draft for draft in long if not draft.document]
    if refused and config.too_long in ("error", "split"):
        why = "" if config.too_long == "error" else "; only plain text can be split"
        raise too_long(refused, max_length, model_max_length, why)
    kept = []
    for draft in drafts:
        size = len(draft.ids)
        parts = [draft]
        if size > max_length:
            said = f"{size:,} tokens, max_length is {max_length:,}"
            if config.too_long == "drop":
                issues.append(Issue(draft.row, "too long", said))
                continue
            if config.too_long == "split":
                parts = split(draft, max_length, prefix)
                issues.append(Issue(draft.row, "split", f"{said}: {len(parts)} parts"))
            else:
                parts = [draft.cut(0, max_length)]
                if parts[0].targets:
                    issues.append(Issue(draft.row, "cut", f"{said}: the end of the answer is missing"))
        for part in parts:
            if part.targets:
                kept.append(part)
            else:
                issues.append(Issue(part.row, "nothing to train on", "no token carries loss"))
    return kept


def split(draft: Draft, max_length: int, prefix: int) -> list[Draft]:
    """A document in parts of at most `max_length` tokens; every token carries loss in exactly one part.

    A part begins with the document's first tokens (BOS) again, else with the token before it, which the
    next one is predicted from.
    """
    if max_length <= max(prefix, 1):
        raise DataError(
            f"data.max_length is {max_length}: too short to split a document",
            hint="--set data.max_length=64 or more",
        )
    parts, start = [draft.cut(0, max_length, f"{draft.row}#1")], max_length
    while start < len(draft.ids):
        stop = min(len(draft.ids), start + max_length - max(prefix, 1))
        part = draft.cut(start - 1, stop, f"{draft.row}#{len(parts) + 1}")
        if prefix:
            part.ids = draft.ids[:prefix] + part.ids[1:]
            part.trained = bytearray(prefix) + part.trained[1:]
        part.answer = (max(1, prefix), len(part.ids) - int(part.ended))
        parts.append(part)
        start = stop
    return parts


class Long(Protocol):
    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def row(self) -> str: ...


def too_long(refused: Sequence[Long], max_length: int, model_max_length: int, why: str) -> DataError:
    """The error that names the rows over `max_length`."""
    most = max(len(draft.ids) for draft in refused)
    return DataError(
        f"{rows(len(refused))} over max_length {max_length:,}{why}",
        details=first([f"{draft.row}: {len(draft.ids):,} tokens" for draft in refused]),
        hint=f"{longer(most, model_max_length)}; or --set data.too_long=drop or truncate",
    )


def longer(longest: int, model_max_length: int) -> str:
    """How to keep the longest row whole, if the model can take it."""
    if longest <= model_max_length:
        return f"--set data.max_length={longest} keeps the longest whole"
    return f"the longest has {longest:,} tokens and the model takes {model_max_length:,}"


def check_lost(
    config: DataConfig,
    issues: Sequence[Issue],
    read: int,
    longest: int,
    model_max_length: int,
    documents: bool,
) -> None:
    """Stop if more rows are dropped or cut than data.max_lost allows.

    raises  DataError with the counts and the two ways out
    """
    lost = {issue.row for issue in issues if issue.kind in LOST}
    if not read or len(lost) <= config.max_lost * read:
        return
    share = len(lost) / read
    problems = [problem for problem in gather(issues) if problem.kind in LOST]
    long = any(problem.kind in ("too long", "cut", "nothing to train on") for problem in problems)
    mend = longer(longest, model_max_length) if long else "put the rows right"
    if long and documents:
        mend = "plain text can be split: --set data.too_long=split"
    raise DataError(
        f"{share:.1%} of the rows ({len(lost):,} of {read:,}) would be dropped or cut; "
        f"data.max_lost allows {config.max_lost:.1%}",
        details=[
            f"{problem.count:,} {problem.kind}: {', '.join(problem.rows)}"
            + (", ..." if problem.count > len(problem.rows) else "")
            for problem in problems
        ],
        hint=f"{mend}; or go on without them: --set data.max_lost={min(0.999, math.ceil(share * 100) / 100):g}",
    )


def set_aside(
    drafts: Sequence[Draft], wanted: float, seed: int, notes: list[str]
) -> tuple[list[Draft], list[Draft]]:
    """(training, validation) drafts; equal ones land on the same side.

    wanted  a share of the distinct rows below 1, else how many of them; 0 for none

    raises  DataError if nothing would be left to train on, or a number is not whole
    """
    if wanted >= 1 and wanted != int(wanted):
        raise DataError(
            f"data.eval is {wanted}, which is no share and no whole number of rows",
            hint="use a share below 1, a whole number of rows, a file, or 0 for none",
        )
    keys = sorted({content(draft, seed) for draft in drafts})
    count = int(wanted) if wanted >= 1 else int(wanted * len(keys) + 1e-9)
    if wanted and not count:
        notes.append(f"no validation set: {wanted:.3g} of {rows(len(keys))} is less than one")
    if count >= len(keys):
        raise DataError(
            f"data.eval takes {rows(count)} of {len(keys):,}, which leaves none to train on",
            hint="set a smaller data.eval, or 0 for none",
        )
    chosen = set(keys[:count])
    sides: tuple[list[Draft], list[Draft]] = ([], [])
    for draft in drafts:
        sides[content(draft, seed) in chosen].append(draft)
    return sides


def without_leaks(train: Sequence[Draft], held: Sequence[Draft], issues: list[Issue]) -> list[Draft]:
    """The training drafts that are not also in the validation file."""
    known = {content(draft): draft.row for draft in held}
    kept = []
    for draft in train:
        same = known.get(content(draft))
        if same is None:
            kept.append(draft)
        else:
            issues.append(Issue(draft.row, "also in the validation set", f"the same as {same}"))
    return kept
