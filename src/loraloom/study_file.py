"""A study as a YAML file: what is asked, which settings are tried, how often, and what was published.

    asks: does the rank matter?
    run: run.yaml              a run's settings, as `loraloom train` takes them; a file stands beside the study
    set: {train.max_steps: 30} changes to them, by dotted name
    settings:                  what is tried: names and dotted settings
      - {name: "q, v", target_modules: [q, v]}
    grid: {r: [1, 8]}          each of them with every combination of these
    repeats: 3                 seeds 0, 1, 2; or seeds: [..]

The other keys are described at `StudyFile`. `presets` holds the same keys by name; those of the chosen one win. The
studies in studies/ ship with the package. Nothing here imports torch.

raises  UserError for a key that there is not, a name that fits no setting, or settings that no run would take
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from .config import RunConfig, expand_short, flatten, read_file, resolve, yaml_text
from .config_errors import in_words
from .config_sections import Positive, Section
from .errors import UserError, did_you_mean

FOLDER = Path(__file__).parent / "studies"
DATA = ("train", "limit", "eval", "encoding", "format", "map", "labels", "duplicates")
ROWS = tuple(f"data.{name}" for name in DATA)  # they decide which rows there are, and who sees them
MEASURE = ("eval.best", "data.loss_on")  # what a setting is compared by
Number = Annotated[float, Field(allow_inf_nan=False)]


class StudyFile(Section):
    """The keys of a study's file."""

    asks: str = Field("", description="the question, in one sentence")
    source: str = Field("", description="where it was asked first")
    found: str = Field("", description="what was found there")
    note: str = Field("", description="how this preset differs from what was published")
    run: str | dict[str, Any] = Field({}, description="a run's settings, or a YAML file of them")
    set: dict[str, Any] = Field({}, description="changes to them, by dotted name")
    settings: list[dict[str, Any]] = Field([], description="what is tried: names and dotted settings")
    grid: dict[str, list[Any]] = Field({}, description="dotted names, each with its values")
    axis: str | None = Field(None, description="a key with numbers: the figures' x axis")
    repeats: Positive = Field(1, description="runs of each setting, with seeds from 0")
    seeds: list[int] | None = Field(None, description="these seeds instead")
    made: Literal["subtraction", "tweets"] | None = Field(
        None, description="data that needs no file: two-digit sums, or tweets and their sentiment"
    )
    answers: Annotated[int, Field(ge=0)] = Field(200, description="final examples to answer for exact match")
    tasks: list[str] = Field([], description="tasks of lm-evaluation-harness, scored when a run is finished")
    task_limit: Positive | None = Field(None, description="only the first so many items of each task")
    task_data: str | None = Field(
        None, description="a folder beside the study with the tasks' files, as eval --data-dir"
    )
    shape: str | dict[str, str] | None = Field(
        None,
        description="a config.json beside the study, to plan without the model; or one for each model's id",
    )
    plan_only: str | None = Field(None, description="why it can only be planned")
    expected: dict[str, Positive] = Field({}, description="weights that train, by setting")
    published: dict[str, dict[str, Number]] = Field({}, description="figures by setting and column")
    presets: dict[str, dict[str, Any]] = Field({}, description="the same keys by preset; they win")

    @field_validator("grid", mode="before")
    @classmethod
    def lists(cls, value: Any) -> Any:
        """`r: 8` means one value."""
        if not isinstance(value, dict):
            return value
        return {key: item if isinstance(item, list) else [item] for key, item in value.items()}


@dataclass(frozen=True)
class Setting:
    """One thing that is tried. values are by dotted name; x is its number on the figures' axis."""

    name: str
    values: dict[str, Any]
    group: str = ""
    x: float | None = None


@dataclass(frozen=True)
class Study:
    """A study with one preset, checked: every setting makes a run's settings."""

    name: str
    preset: str | None
    file: StudyFile
    path: Path
    base: dict[str, Any]  # a run's settings by dotted name
    settings: list[Setting]
    seeds: list[int]

    def values(self, setting: Setting, seed: int | None = None) -> dict[str, Any]:
        """The dotted settings of a run."""
        own = merged(self.base, setting.values)
        return own if seed is None else own | {"train.seed": seed}

    def config(self, setting: Setting) -> RunConfig:
        """The settings of a setting's runs, before their data and folder are known."""
        given = self.values(setting)
        blanks = {} if any(key.startswith("data.train") for key in given) else {"data.train": "none"}
        return resolve(None, given | blanks | {"output": "none"})[0]

    def to_dict(self) -> dict[str, Any]:
        """What decides the runs and their scores: a folder belongs to one of these."""
        return {
            "name": self.name,
            "preset": self.preset,
            "base": self.base,
            "settings": [{"name": one.name, "values": one.values} for one in self.settings],
            "seeds": self.seeds,
            "made": self.file.made,
            "answers": self.file.answers,
            "tasks": self.file.tasks,
            "task_limit": self.file.task_limit,
        }

    @property
    def tasks(self) -> list[str]:
        """Names of tasks; YAML files of one's own with their paths."""
        return [
            str(beside(self.path, name)) if name.endswith((".yaml", ".yml")) else name
            for name in self.file.tasks
        ]

    @property
    def task_data(self) -> Path | None:
        name = self.file.task_data
        return None if name is None else beside(self.path, name, folder=True)

    def shape(self, model: str) -> dict[str, Any] | None:
        """The shipped config.json of a model, if the study names one."""
        given = self.file.shape
        name = given.get(model) if isinstance(given, dict) else given
        if name is None:
            return None
        path = beside(self.path, name)
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from None


def shipped() -> dict[str, Path]:
    """The studies of the package by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def read_study(name: str | Path, preset: str | None = None) -> Study:
    """A study that ships with the package, or a file.

    preset  one of its presets; None: the first, if it has any
    """
    path = find(name)
    tree, lines = read_file(path)
    given = parse(path, tree, lines)
    if preset is None and given.presets:
        preset = next(iter(given.presets))
    if preset is not None:
        if preset not in given.presets:
            hint = did_you_mean(preset, given.presets) or "leave --preset out: it has none"
            raise UserError(f"{path.stem} has no preset {preset!r}", hint=hint)
        given = parse(path, {k: v for k, v in tree.items() if k != "presets"} | given.presets[preset], {})
    seeds = given.seeds if given.seeds is not None else list(range(given.repeats))
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds is {seeds}", hint="name each seed once, and at least one")
    study = Study(path.stem, preset, given, path, base_of(path, given), settings_of(path, given), seeds)
    check(study)
    return study


def find(name: str | Path) -> Path:
    """The file of a study.

    raises  UserError if there is none: what there is
    """
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    path = Path(name)
    if path.is_file():
        return path
    hint = "`loraloom study` lists those that ship; a file of your own may be named too"
    raise UserError(f"there is no study {str(name)!r}", hint=did_you_mean(str(name), known) or hint)


def parse(path: Path, tree: Mapping[str, Any], lines: Mapping[str, int]) -> StudyFile:
    try:
        return StudyFile.model_validate(tree)
    except ValidationError as error:
        raise in_words(error, dict(StudyFile.model_fields), file=path, lines=lines) from None


def beside(path: Path, name: str, *, folder: bool = False) -> Path:
    """A file or folder that a study names: beside it, or where the name says."""
    near = path.parent / name
    if near.is_dir() if folder else near.is_file():
        return near
    kind = "folder" if folder else "file"
    raise UserError(f"{path} names {name}, and there is no such {kind} beside it")


def base_of(path: Path, given: StudyFile) -> dict[str, Any]:
    """The run's settings by dotted name, with the study's changes."""
    if isinstance(given.run, str):
        tree = read_file(beside(path, given.run))[0]
    else:
        tree = expand_short(given.run)
    return merged(flatten(tree), given.set)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings with changes, which also replace what stands below or above them.

    Another method does not keep the options of the one before.
    """
    new = flatten(expand_short(dict(changes)))
    over = [*new, *(["method"] if "method" in changes else [])]
    kept = {
        key: value
        for key, value in base.items()
        if not any(key.startswith(name + ".") or name.startswith(key + ".") for name in over)
    }
    return kept | new


def settings_of(path: Path, given: StudyFile) -> list[Setting]:
    """Every entry of `settings` with every combination of `grid`."""
    made = []
    for entry in given.settings or [{}]:
        values = {key: value for key, value in entry.items() if key != "name"}
        group = str(entry.get("name") or words(values))
        for chosen in product(*given.grid.values()):
            more = dict(zip(given.grid, chosen))
            every = values | more
            name = ", ".join(filter(None, [group, words(more)])) or "as given"
            made.append(Setting(name, every, group, number_of(path, given.axis, every)))
    names = [one.name for one in made]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: two settings have one name", details=twice, hint="give them a `name`")
    unknown = [name for name in given.expected if name not in names]
    if unknown:
        raise UserError(
            f"{path}: expected names no setting", details=unknown, hint=did_you_mean(unknown[0], names)
        )
    return made


def words(values: Mapping[str, Any]) -> str:
    """Dotted settings as a name: `r 8, alpha 16`."""
    parts = []
    for key, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        parts.append(f"{key.rpartition('.')[2].replace('_', ' ')} {text}")
    return ", ".join(parts)


def number_of(path: Path, axis: str | None, values: Mapping[str, Any]) -> float | None:
    """A setting's place on the x axis."""
    if axis is None:
        return None
    value = values.get(axis)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(
            f"{path}: axis is {axis}, and a setting has {axis}: {value}", hint="name numbers there"
        )
    return float(value)


def check(study: Study) -> None:
    """Every setting must make a run's settings, and what all of them share must not differ."""
    configs = {}
    for setting in study.settings:
        if "train.seed" in setting.values:
            raise UserError(f"{study.path}: {setting.name} sets train.seed", hint="use repeats, or seeds")
        try:
            configs[setting.name] = study.config(setting)
        except UserError as error:
            error.message = f"{study.path.name}, {setting.name}: {error.message}"
            raise
    for names, message in (
        (("task",), "its settings are of different tasks"),
        (ROWS, "its settings differ in their data, but the rows are shared by all settings"),
        (MEASURE, "its settings would be compared by unlike scores"),
    ):
        unlike = differing(configs, names)
        if unlike:
            hint = f"set {' and '.join(unlike)} once, in run or in set"
            raise UserError(f"{study.path}: {message}", details=list(unlike.values()), hint=hint)


def differing(configs: Mapping[str, RunConfig], names: Sequence[str]) -> dict[str, str]:
    """Those of the names that have more than one value, each in words with the first setting of a value."""
    found = {}
    for name in names:
        first: dict[str, str] = {}
        for setting, config in configs.items():
            value = config.model_dump(mode="json")
            for part in name.split("."):
                value = value[part]
            first.setdefault(yaml_text(value), setting)
        if len(first) > 1:
            found[name] = f"{name}: " + ", ".join(f"{text} ({setting})" for text, setting in first.items())
    return found


def slug(text: str) -> str:
    """A name as a folder may have it."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "run"


def runs_of(study: Study) -> list[tuple[Setting, int, str]]:
    """Every run: its setting, its seed, its folder's name. One seed of all settings comes before the next."""
    width = len(str(len(study.settings)))
    places = {one.name: place for place, one in enumerate(study.settings, start=1)}
    return [
        (one, seed, f"{places[one.name]:0{width}d}-{slug(one.name)[:60]}-seed{seed}")
        for seed in study.seeds
        for one in study.settings
    ]


def listing() -> list[dict[str, Any]]:
    """The shipped studies: name, question, source, what was found, presets."""
    rows = []
    for name, path in shipped().items():
        given = parse(path, *read_file(path))
        rows.append(
            {
                "name": name,
                "asks": given.asks,
                "source": given.source,
                "found": given.found,
                "presets": list(given.presets),
            }
        )
    return rows
