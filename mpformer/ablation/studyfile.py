"""The schema of a study file, and its errors as messages.

    # MP-Former, Table 7: the components one after the other.
    title: What each component brings
    base: ../recipes/coco-instance-r50.yaml
    settings: {train.length: 12 epochs}            # laid over the base for every row
    table: MP-Former, Table 7                      # where the paper's figures stand
    columns:
      val/AP: {title: AP, paper: AP mask}          # metric key; our heading; the paper's heading
    baseline: mask2former
    seeds: 3                                       # 0, 1, 2; or a list
    rows:
      mask2former:
        title: Mask2Former
        settings: {model.pilot.queries: 0}         # dotted or nested
        paper: {row: "1. Mask2Former", figures: {val/AP: 38.7}}
    profiles_from: ../profiles.yaml                # the sizes `mini` and `smoke`

A table whose columns come from models of several tasks has `parts` in the place of `base`, and columns named
`PART:METRIC`; a row is then one run per part (and seed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError, model_validator

from mpformer.config.messages import described, written_keys
from mpformer.config.section import Section
from mpformer.config.yamlfile import Source, nearest
from mpformer.types import InputError, Task

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Of a row, a part or a profile: it becomes part of folder names."""


def _read_seeds(value: Any) -> tuple[int, ...]:
    seeds = tuple(range(value)) if type(value) is int else value
    if not isinstance(seeds, list | tuple) or not seeds or any(type(s) is not int or s < 0 for s in seeds):
        raise ValueError("expected a list of seeds such as [0, 1, 2], or how many of them")
    return tuple(dict.fromkeys(seeds))


Seeds = Annotated[tuple[int, ...], BeforeValidator(_read_seeds)]
"""A list of seeds, or how many of 0, 1, 2, ..."""


class Column(Section):
    """One metric of the table."""

    title: str
    paper: str | None = None
    """The heading of this column in the paper's table."""
    digits: Annotated[int, Field(ge=0, le=6)] = 1


class PaperRow(Section):
    """What the paper reports for a row."""

    row: str
    """How the paper's table names the row."""
    table: str | None = None
    """Where it is not the study's table."""
    figures: dict[str, float]
    """By column."""


class Part(Section):
    """The models that some columns of the table come from."""

    base: str
    """Recipe."""
    settings: dict[str, Any] = Field(default_factory=dict)


class Row(Section):
    title: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    parts: dict[Name, dict[str, Any] | None] = Field(default_factory=dict)
    """Settings of single parts; null: the row has no such part."""
    paper: PaperRow | None = None


class Generate(Section):
    """A generated data set (`mpformer data synth`)."""

    root: str
    train: int = 400
    val: int = 60
    size: int = 128
    things: int = 5
    seed: int = 0


class Profile(Section):
    """Another size of the same study."""

    base: str | dict[Task, str] | None = None
    """A recipe in the place of every base; or one for each task that a base may have."""
    settings: dict[str, Any] = Field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of single rows, stronger than the rows' own."""
    seeds: Seeds | None = None
    drop: tuple[str, ...] = ()
    """Settings (or whole sections) of study, parts and rows that do not carry over to this size."""
    carry: tuple[str, ...] = ()
    """Settings (or whole sections) of the study's base that hold at this size, too."""
    generate: Generate | None = None
    """The data set of this size, made before the first run."""
    replace: dict[str, dict[Any, Any]] = Field(default_factory=dict)
    """What a value of a setting, of the study or its base, becomes at this size: {setting: {there: here}}."""


class StudyFile(Section):
    title: str
    base: str | None = None
    parts: dict[Name, Part] = Field(default_factory=dict)
    """Instead of `base`: the runs that a row consists of."""
    settings: dict[str, Any] = Field(default_factory=dict)
    table: str | None = None
    columns: Annotated[dict[str, Column], Field(min_length=1)]
    """By metric key, or PART:METRIC."""
    x: Literal["images", "steps", "gpu_hours"] = "images"
    """What the training-speed curves are drawn against first."""
    baseline: str
    seeds: Seeds = (0,)
    figures: Literal["last", "best"] = "last"
    """Of which weights of a run the table's figures are: the last, or those that are best by its
    `train.keep.best`. Choosing by the split that is measured flatters."""
    rows: Annotated[dict[Name, Row], Field(min_length=1)]
    search: Search | None = None
    profiles_from: str | None = None
    """A file of profiles; what stands under `profiles` here is laid over it."""
    profiles: dict[Name, Profile] = Field(default_factory=dict)
    note: str | None = None
    """Printed under the table: what the reader of its figures should know."""

    @model_validator(mode="after")
    def _check_base(self) -> StudyFile:
        if (self.base is None) == (not self.parts):
            raise ValueError("either `base` or `parts` is expected")
        return self

    @property
    def bases(self) -> dict[str, str]:
        """The recipe of each part; that of the one part without a name where a row is a single run."""
        if self.base is not None:
            return {"": self.base}
        return {name: part.base for name, part in self.parts.items()}

    @property
    def note_on_figures(self) -> str | None:
        """What the reader of a table of the study has to know of how its figures were chosen."""
        if self.figures == "last":
            return None
        return "Figures of each run's best weights, chosen by what is measured here: they flatter."

    def parts_of(self, row: str) -> tuple[str, ...]:
        return tuple(part for part in self.bases if self.rows[row].parts.get(part, {}) is not None)


def split_column(column: str) -> tuple[str, str]:
    """(part, metric key) of a column's name; the part is '' where a row is a single run."""
    part, _, metric = column.rpartition(":")
    return part, metric


# --- search ---------------------------------------------------------------------------------------


class Choice(Section):
    choice: Annotated[tuple[Any, ...], Field(min_length=1)]


class Uniform(Section):
    uniform: tuple[float, float]


class LogUniform(Section):
    loguniform: tuple[Annotated[float, Field(gt=0.0)], float]


class Integers(Section):
    integers: tuple[int, int]
    """Both ends included."""


Space = Choice | Uniform | LogUniform | Integers


class Search(Section):
    """A search over settings, beside the rows: `samples` points are run, each as a row of its own."""

    space: Annotated[dict[str, Space], Field(min_length=1)]
    """By setting: {choice: [...]}, or [low, high] of `uniform`, `loguniform` or `integers`."""
    samples: Annotated[int, Field(ge=1)] = 20
    column: str
    """The column that is to be best: the largest, of a loss the smallest."""
    row: str
    """The row that the samples vary."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the random points."""
    stop: Literal["none", "asha"] = "none"
    """asha: samples that lag behind at a rung are stopped (Tune's ASHAScheduler); needs `evaluate.every`."""
    grace: Annotated[int, Field(ge=1)] = 1
    """asha: nothing is stopped before this many evaluations."""
    reduction: Annotated[float, Field(gt=1.0)] = 3.0
    """asha: one sample in so many passes a rung."""


StudyFile.model_rebuild()


# --- errors ---------------------------------------------------------------------------------------


def check(source: Source) -> StudyFile:
    """The file against its schema, and its names against each other. Raises `InputError` naming the place."""
    try:
        file = StudyFile.model_validate(source.as_written(StudyFile))
    except ValidationError as error:
        raise InputError(_explain(error, source)) from None
    for name, names, what, keys in _names(file):
        if name not in names:
            where = f"{source.place(keys)}: {'.'.join(keys)}"
            raise InputError(f"{where}: no {what} '{name}'; nearest: {nearest(name, names)}")
    for column in file.columns:
        if split_column(column)[0] not in file.bases:
            expected = f"PART:METRIC with a part of {', '.join(file.parts)}" if file.parts else "a metric"
            raise InputError(f"{source.place(['columns', column])}: columns.{column}: {expected} is expected")
    for name, row in file.rows.items():
        for column in row.paper.figures if row.paper else ():
            if file.columns[column].paper is None:
                raise InputError(
                    f"{source.place(['columns', column])}: columns.{column}: row '{name}' has a figure of "
                    "the paper, so `paper:`, the paper's heading of this column, is expected"
                )
        if row.paper and (row.paper.table or file.table) is None:
            raise InputError(
                f"{source.place(['rows', name, 'paper'])}: rows.{name}.paper: figures without a table: "
                "give `table:` here or for the study"
            )
    return file


def _names(file: StudyFile) -> Iterator[tuple[str, Mapping[str, Any], str, tuple[str, ...]]]:
    """Every name that must stand elsewhere in the file: (name, where, what it is, its own place)."""
    yield file.baseline, file.rows, "row", ("baseline",)
    for profile_name, profile in file.profiles.items():
        for row_name in profile.rows:
            yield row_name, file.rows, "row", ("profiles", profile_name, "rows", row_name)
    for name, row in file.rows.items():
        for part in row.parts:
            yield part, file.parts, "part", ("rows", name, "parts", part)
        for column in row.paper.figures if row.paper else ():
            yield column, file.columns, "column", ("rows", name, "paper", "figures", column)
    if file.search:
        yield file.search.column, file.columns, "column", ("search", "column")
        yield file.search.row, file.rows, "row", ("search", "row")


_SECTIONS: dict[str, type[Section]] = {"rows": Row, "columns": Column, "profiles": Profile, "parts": Part}


def _explain(error: ValidationError, source: Source) -> str:
    first = error.errors()[0]
    keys = written_keys(first, source.tree)
    place, key = source.place(keys), ".".join(keys)
    if first["type"] == "extra_forbidden":
        section = {1: StudyFile, 2: Search, 3: _SECTIONS.get(keys[0]), 4: PaperRow}.get(len(keys))
        known = section.model_fields if section else StudyFile.model_fields
        return f"{place}: no key '{key}' in a study; nearest: {nearest(keys[-1], known)}"
    if "[key]" in first["loc"]:
        return (
            f"{place}: {key}: expected a name of letters, digits, - and _ that begins with none of these two"
        )
    return f"{place}: {key}{': ' if key else ''}{described(first, StudyFile, keys)}"
