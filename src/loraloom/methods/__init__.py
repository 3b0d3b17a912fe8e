"""The family: one method a file, found by its file name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from math import isfinite
from typing import Any

from ..errors import UserError, did_you_mean
from .base import Method, options_of


def names() -> list[str]:
    """The methods there are: the files of this folder, but base and those with an underscore."""
    files = (item.name for item in pkgutil.iter_modules(__path__))
    return sorted(name for name in files if name != "base" and not name.startswith("_"))


def find(name: str) -> type[Method]:
    """The method class defined in the file of that name.

    raises  UserError if there is no such file
    """
    if name not in names():
        raise UserError(
            f"there is no method {name!r}; there are {', '.join(names())}", hint=did_you_mean(name, names())
        )
    module = importlib.import_module(f"{__name__}.{name}")
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise TypeError(f"methods/{name}.py must define one method, it defines {len(own)}")
    return own[0]


def settings(name: str) -> list[tuple[str, str, str]]:
    """(name, default, meaning) of what a method can be set to, beside what every method has."""
    kind = find(name)
    own = {item.name: item.default for item in fields(kind)}
    return [(key, str(own[key]), text) for key, text in options_of(kind).items()]


def name_of(method: Method) -> str:
    """The name a method is found by."""
    return type(method).__module__.rpartition(".")[2]


def make(name: str, options: Mapping[str, Any]) -> Method:
    """A method with its settings.

    raises  UserError for an unknown setting, with the nearest name
    """
    kind = find(name)
    known = [item.name for item in fields(kind)]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise UserError(
            f"method {name} has no setting {', '.join(unknown)}", hint=did_you_mean(unknown[0], known)
        )
    return kind(**{key: _typed(kind, key, value) for key, value in options.items()})


def _typed(kind: type[Method], key: str, value: Any) -> Any:
    """A setting as its default's type asks: whole numbers, numbers (YAML reads 1e-4 as text), true or false.

    raises  UserError for anything else
    """
    default = next(item.default for item in fields(kind) if item.name == key)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"method.{key} is {value!r}", hint="it can be true or false")
        return value
    if not isinstance(default, int | float):
        return value
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise UserError(f"method.{key} is {value!r}, which is not a number") from None
    if isinstance(default, float) and isfinite(number):
        return number
    if not number.is_integer():
        raise UserError(
            f"method.{key} is {value!r}", hint="it is a whole number" if isfinite(number) else None
        )
    return int(number)
