"""The settings of a run: one schema for YAML files, flags, Python and the docs.

`resolve` merges the sources (default < file < flag), refuses unknown keys with the nearest name, and
remembers where each value came from. Settings that only the run can know (`auto`) are filled in by the
trainer, which stores them with the origin "auto".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from .config_errors import in_words
from .config_sections import (
    Auto,
    DataConfig,
    EvalConfig,
    Fraction,
    ModelConfig,
    Positive,
    Section,
    TrainConfig,
)
from .config_sections import Source as Source
from .errors import UserError


class RunConfig(Section):
    """A whole run. `model`, `data` and `output` are enough."""

    model: ModelConfig
    data: DataConfig
    output: str = Field(description="the run folder to make")
    task: Literal["causal", "classification"] = Field(
        "causal",
        description="causal: text is continued; classification: a label for a text or a pair of texts, or a number",
    )
    method: dict[str, Any] = Field(
        {"name": "lora"}, description="a name, such as rslora, or {name: ..., and the method's own options}"
    )
    r: Positive | Auto = Field("auto", description="the rank; auto: the method's own default, 16 for LoRA")
    alpha: Annotated[float, Field(gt=0)] | str = Field(
        "auto", description="the scale's numerator: a number, or 2r; auto: the method's own, 2r for LoRA"
    )
    dropout: Fraction = Field(0.0, description="on the adapter's input")
    target_modules: list[str] | str = Field(
        "auto",
        description="auto: all-linear, or where the method goes by itself; all-linear; a regular expression that "
        "matches whole names; or a list of names, suffixes and "
        "roles (q, k, v, o, mlp, down, head, embed)",
    )
    layers: str | None = Field(None, description="only these layers, such as 0-11,20; the first is 0")
    rank_pattern: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {}, description="r for the layers whose name matches the pattern; 0 leaves them out"
    )
    alpha_pattern: dict[str, float] = Field(
        {}, description="alpha for the layers whose name matches the pattern"
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases are trained too")
    modules_to_save: list[str] = Field([], description="modules trained whole, such as a new head")
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @field_validator("layers", mode="before")
    @classmethod
    def layers_as_text(cls, value: Any) -> Any:
        """`layers: 1` and `layers: [0, 1]` mean the same as text."""
        if isinstance(value, list):
            return ",".join(map(str, value))
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def labels_have_their_task(self) -> RunConfig:
        glue = [source.path for source in self.data.train if source.path.startswith("glue:")]
        if self.task == "causal" and (glue or self.eval.best not in ("auto", "loss")):
            what = glue[0] if glue else f"eval.best={self.eval.best}"
            raise ValueError(f"{what} is for labels, not for text: set task=classification")
        return self

    @model_validator(mode="after")
    def alpha_is_a_number_or_multiple(self) -> RunConfig:
        if self.alpha != "auto":
            resolve_alpha(self.alpha, 1 if self.r == "auto" else self.r)
        return self


FREE = ("data.map", "rank_pattern", "alpha_pattern")  # the user's own keys stand below these
SHORT = {"model": "id", "data": "train", "method": "name"}  # `model: x` means `model: {id: x}`


def resolve_alpha(alpha: float | str, r: int) -> float:
    """alpha as a number: 32, "32", or a multiple of the rank such as "2r".

    raises  ValueError if it is neither
    """
    if isinstance(alpha, str):
        match = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+|)\s*\*?\s*(r?)", alpha.strip())
        number = float(match[1] or 1) if match and (match[1] or match[2]) else 0.0
        if not match or not 0 < number < math.inf:
            raise ValueError(f"alpha is {alpha!r}: use a number or a multiple of the rank, such as 2r")
        return number * (r if match[2] else 1)
    return float(alpha)


def shown_alpha(config: RunConfig) -> str:
    """alpha in words: a number, once the run has decided r."""
    if config.alpha == "auto" or config.r == "auto":
        return str(config.alpha)
    return f"{resolve_alpha(config.alpha, config.r):g}"


def resolve(
    file: Path | str | None = None, settings: Mapping[str, Any] | None = None
) -> tuple[RunConfig, dict[str, str]]:
    """The run's settings and the origin of each, by dotted name: "default", "file" or "flag".

    settings  dotted names to values; they win over the file's

    raises  UserError for an unknown key, a wrong value or a missing setting: all of them at once
    """
    tree, lines = read_file(file) if file is not None else ({}, {})
    origins = dict.fromkeys(flatten(tree), "file")
    for key, value in (settings or {}).items():
        for name, leaf in flatten(expand_short({key: value})).items():
            drop_below(origins, name)
            assign(tree, name, leaf)
            origins[".".join(path_of(name)[:-1]) if under_free(name) else name] = "flag"
    config = validate(tree, file=file, lines=lines)
    every = dict.fromkeys(flatten(config.model_dump()), "default")
    return config, {name: origins.get(name, origin_above(name, origins)) for name in every}


def read_stored(path: Path) -> RunConfig:
    """The settings of a run folder, also of one from before a key got its present name.

    raises  UserError as `resolve` does
    """
    tree, lines = read_file(path)
    train = tree.get("train")
    if isinstance(train, dict) and "gradient_checkpointing" in train:
        train["recompute"] = "full" if train.pop("gradient_checkpointing") else "none"
    return validate(tree, file=path, lines=lines)


def read_file(path: Path | str) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML file as a tree with the short forms written out, and the line of each dotted name.

    raises  UserError if there is no such file, it is not YAML, or it sets a key twice
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no configuration file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = yaml.safe_load(text) or {}
        node = yaml.compose(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not YAML", details=[line for line in str(error).splitlines() if line]
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold key: value lines", hint="three are enough: model, data, output")
    lines = dict(key_lines(node))
    seen = [name for name, _ in key_lines(node)]
    twice = sorted({name for name in seen if seen.count(name) > 1})
    if twice:
        raise UserError(f"{path} sets a key twice", details=[f"line {lines[name]}: {name}" for name in twice])
    return expand_short(tree), lines


def key_lines(node: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Each dotted key of a YAML document with its line, from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from key_lines(value, name + ".")


def expand_short(tree: dict[str, Any]) -> dict[str, Any]:
    """`model: x` as `model: {id: x}`, and the like."""
    return {
        key: {SHORT[key]: value} if key in SHORT and not isinstance(value, dict) else value
        for key, value in tree.items()
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as dotted names; free mappings and empty ones are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and name not in FREE:
            flat |= flatten(value, name + ".")
        else:
            flat[name] = value
    return flat


def assign(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted name in a tree of dicts; a short form on the way is written out."""
    *path, last = path_of(name)
    for key in path:
        below = tree.get(key)
        if not isinstance(below, dict):
            below = {} if below is None or key not in SHORT else {SHORT[key]: below}
        tree[key] = dict(below)
        tree = tree[key]
    tree[last] = value


def path_of(name: str) -> list[str]:
    """The parts of a dotted name; below a free mapping the rest is one key, whatever dots it has."""
    free = under_free(name)
    return [*free.split("."), name.removeprefix(free + ".")] if free else name.split(".")


def under_free(name: str) -> str | None:
    """The free mapping that a name stands in, such as `data.map` for data.map.prompt."""
    return next((free for free in FREE if name.startswith(free + ".")), None)


def drop_below(origins: dict[str, str], name: str) -> None:
    """Forget the origins of what `name` now replaces."""
    for key in [key for key in origins if key.startswith(name + ".")]:
        del origins[key]


def origin_above(name: str, origins: Mapping[str, str]) -> str:
    """The origin of the nearest parent that was set, such as `data.train` for its first source."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in origins:
            return origins[name]
    return "default"


def validate(tree: Mapping[str, Any], *, file: Path | str | None, lines: Mapping[str, int]) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise in_words(error, flatten_names(RunConfig), file=file, lines=lines) from None


def flatten_names(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every dotted name of the schema with its pydantic field, sections first."""
    names: dict[str, Any] = {}
    for key, field in section.model_fields.items():
        names[f"{prefix}{key}"] = field
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names |= flatten_names(kind, f"{prefix}{key}.")
    return names


def parse_setting(text: str) -> tuple[str, Any]:
    """`key=value` of a --set flag; the value is read as YAML.

    raises  UserError if there is no `=`, or the value is not YAML
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise UserError(f"--set {text}: write key=value, such as --set train.learning_rate=1e-4")
    try:
        return key.strip(), yaml.safe_load(value) if value else None
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or "it is not YAML"
        raise UserError(
            f"--set {text}: {reason}", hint="put quotes around a value with special characters"
        ) from None


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The same settings with some dotted names replaced: how the trainer fills in `auto`."""
    tree = config.model_dump()
    for name, value in values.items():
        assign(tree, name, value)
    return RunConfig.model_validate(tree)


def to_yaml(config: RunConfig, origins: Mapping[str, str] | None = None) -> str:
    """The settings as YAML that `resolve` reads back; the origin of a value stands behind it as a comment."""
    lines: list[str] = []

    def write(tree: Mapping[str, Any], prefix: str, indent: str) -> None:
        for key, value in tree.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping) and value:
                lines.append(f"{indent}{key}:")
                write(value, name + ".", indent + "  ")
            else:
                plain = yaml_text(value)
                origin = (origins or {}).get(name, origin_above(name, origins or {}))
                comment = f"  # {origin}" if origins else ""
                lines.append(f"{indent}{yaml_text(key)}: {plain}{comment}")

    write(config.model_dump(mode="json"), "", "")
    return "\n".join(lines) + "\n"


def yaml_text(value: Any) -> str:
    """A value or a mapping's key as YAML writes it on one line, quoted where it must be."""
    whole: dict[str, Any] = {"default_flow_style": True, "width": math.inf}
    text = yaml.safe_dump(value, allow_unicode=True, **whole).removesuffix("...\n").strip(" \n")
    if len(text.splitlines()) > 1:  # line breaks inside: only in double quotes they are written as \\n
        text = yaml.safe_dump(value, default_style='"', **whole).strip(" \n")
    return text


def describe(names: Sequence[str] | None = None) -> list[tuple[str, str, str]]:
    """Rows (name, default, description) of every setting: the docs' table and `--help` come from here."""
    rows = []
    for name, field in flatten_names(RunConfig).items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        default = (
            "required"
            if field.is_required()
            else yaml_text(field.default)
            if field.default is not None
            else "none"
        )
        if names is None or name in names:
            rows.append((name, default, field.description or ""))
    return rows
