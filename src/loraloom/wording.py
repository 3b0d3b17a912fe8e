"""Numbers as people read them: the same in the terminal, the report and the model card."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def number(value: Any, digits: int = 4) -> str:
    """A number in `digits` significant digits, thousands set apart, tiny ones as 1.6e-4; the rest as text."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return minus(f"{value:,}".replace(",", "\u202f"))
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return minus(str(value))
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.{max(digits - 2, 0)}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return minus(f"{mantissa}e{int(exponent)}")
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0) if value else 0
    return minus(f"{value:,.{places}f}".replace(",", "\u202f"))


def signed(value: float | None, digits: int = 3) -> str:
    """A difference with its sign, also where it is positive."""
    if value is None:
        return MISSING
    return ("+" if value > 0 else "") + number(float(value), digits)


def minus(text: str) -> str:
    """The same with a true minus sign in front, and a hyphen in exponents."""
    return MINUS + text[1:] if text.startswith("-") else text


def percent(share: float | None, digits: int = 3) -> str:
    """A share such as 0.0167 as 1.67 %."""
    return MISSING if share is None else f"{number(100.0 * share, digits)}\u202f%"


def amount(count: float | None) -> str:
    """A count such as 10100000 as 10.1 M."""
    if count is None:
        return MISSING
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 10 * limit or (abs(count) >= limit and limit > 1e3):
            return f"{count / limit:.3g}\u202f{unit}"
    return number(int(count) if float(count).is_integer() else float(count))


def size(bytes_: float | None) -> str:
    """Bytes as MiB or GiB."""
    if bytes_ is None:
        return MISSING
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if bytes_ >= limit:
            return f"{bytes_ / limit:{'.3g' if bytes_ < 1000 * limit else '.0f'}}\u202f{unit}"
    return f"{bytes_:.0f}\u202fB"


def duration(seconds: float | None) -> str:
    """Seconds as 42 s, 6 min 11 s or 3 h 04 min."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.2g}\u202fs"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}\u202fs"
    if whole < 3600:
        return f"{whole // 60}\u202fmin {whole % 60:02d}\u202fs"
    minutes = round(seconds / 60)
    return f"{minutes // 60}\u202fh {minutes % 60:02d}\u202fmin"


def moment(iso: str | None) -> datetime | None:
    """An ISO 8601 time, in UTC where it names no zone; None for what is not one."""
    try:
        when = datetime.fromisoformat(str(iso))
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def day(iso: str | None) -> str:
    """An ISO 8601 time as 2026-11-22 09:14 UTC."""
    when = moment(iso)
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if when else MISSING


def plural(count: int, noun: str) -> str:
    """A count with its noun: 1 step, 368 steps."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"
