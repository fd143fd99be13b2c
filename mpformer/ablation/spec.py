"""A study: one YAML file that names a base recipe, the rows of a table, seeds and profiles.

    title: Which decoder layers to pilot
    base: ../recipes/coco-instance-r50.yaml
    settings: {train.length: 12 epochs}            # laid over the base for every row
    table: MP-Former, Table 7                      # where the paper's figures stand
    columns:
      val/AP: {title: AP, paper: AP}               # metric key; our heading; the paper's heading
    baseline: mask2former
    seeds: 3                                       # 0, 1, 2; or a list
    rows:
      mask2former:
        title: Mask2Former
        settings: {model.pilot.queries: 0}         # dotted or nested
        paper: {row: "-", figures: {val/AP: 39.1}}
    profiles:
      smoke: {base: ../recipes/synthetic-tiny.yaml, seeds: 1, settings: {train.length: 20 steps}}

A row's settings are: base recipe < `settings` < the profile's `settings` < the row's `settings` < the
profile's `rows.ROW` < `key=value` of the command line. Nothing here imports torch or ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError

from mpformer.config import Config, Section, build_config, inline_dataset, read_recipe, run_name
from mpformer.types import InputError
from mpformer.yamlfile import Source, merge, nearest, parse_scalar, read_yaml

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Of a row or a profile: it becomes part of folder names."""


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
    """By metric key."""


class Row(Section):
    title: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    paper: PaperRow | None = None


class Profile(Section):
    """Another size of the same study."""

    base: str | None = None
    """A recipe instead of the study's base."""
    settings: dict[str, Any] = Field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of single rows, stronger than the rows' own."""
    seeds: Seeds | None = None


class StudyFile(Section):
    title: str
    base: str
    settings: dict[str, Any] = Field(default_factory=dict)
    table: str | None = None
    columns: Annotated[dict[str, Column], Field(min_length=1)]
    x: Literal["images", "steps"] = "images"
    """What the training-speed curves are drawn against."""
    baseline: str
    seeds: Seeds = (0,)
    rows: Annotated[dict[Name, Row], Field(min_length=1)]
    profiles: dict[Name, Profile] = Field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One run of a study: a row with a seed."""

    row: str
    seed: int
    config: Config

    @property
    def run_dir(self) -> Path:
        return Path(self.config.storage) / run_name(self.config)

    @property
    def finished(self) -> bool:
        """A run writes its summary when it has ended well, and then it is never run again."""
        return (self.run_dir / "summary.json").exists()

    @property
    def label(self) -> str:
        return f"{self.row} s{self.seed}"


@dataclass(frozen=True)
class Study:
    """A study file with a profile chosen and every row's settings resolved."""

    path: Path
    file: StudyFile
    profile: str | None
    base: Config
    """The settings that the rows have in common: recipe, study and profile settings, command line."""
    rows: Mapping[str, Config]
    """The resolved settings of each row, in the order of the file."""
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """The file's stem and the profile: MLflow's experiment and the study's folder."""
        return f"{self.path.stem}-{self.profile}" if self.profile else self.path.stem

    @property
    def folder(self) -> Path:
        """Where the study's runs, tables and curves lie."""
        return Path(self.base.storage) / self.name

    def title(self, row: str) -> str:
        return self.file.rows[row].title or row

    def paper_figure(self, row: str, metric: str) -> tuple[float, str] | None:
        """The paper's figure for a cell and the table, row and column where it stands; None without one."""
        paper = self.file.rows[row].paper
        if paper is None or metric not in paper.figures:
            return None
        table, column = paper.table or self.file.table, self.file.columns[metric].paper
        return paper.figures[metric], f"{table}, row '{paper.row}', column '{column}'"

    def trials(self, only: str | None = None) -> list[Trial]:
        """Rows x seeds, all rows of one seed before the next seed; with `only`, those of one row.

        Raises `InputError`, with the nearest row, where there is no row `only`.
        """
        if only is not None and only not in self.rows:
            raise InputError(f"{self.path}: no row '{only}'; nearest: {nearest(only, self.rows)}")
        rows = [only] if only else list(self.rows)
        return [Trial(row, seed, self._seeded(row, seed)) for seed in self.seeds for row in rows]

    def _seeded(self, row: str, seed: int) -> Config:
        config = self.rows[row]
        train = config.train.model_copy(update={"seed": seed})
        return config.model_copy(update={"train": train, "name": row, "storage": str(self.folder)})


def load_study(path: str | Path, settings: Sequence[str] = ()) -> Study:
    """A study file with `profile=NAME`, `seeds=...` and `key.sub=value` settings applied.

    Without `profile=`, the profile `paper` if there is one, else the base as it is. Raises `InputError`
    naming file, line, key and the nearest right name.
    """
    path = Path(path)
    source = read_yaml(path)
    file = _check(source)
    chosen, overrides = _split_settings(path, file, settings)
    profile = file.profiles[chosen.profile] if chosen.profile else Profile()
    recipe_path = (path.parent / (profile.base or file.base)).resolve()
    if not recipe_path.is_file():
        key = f"profiles.{chosen.profile}.base" if profile.base else "base"
        read_yaml(
            recipe_path, named_by=f"{source.place(key.split('.'))}: {key}"
        )  # raises, with the nearest file
    recipe = read_recipe(recipe_path)
    recipe.tree["name"] = path.stem

    def lay(under: Source, tree: Mapping[str, Any], keys: str) -> Source:
        return under.laid_under(_settings(source, tree, keys)) if tree else under

    common = lay(
        lay(recipe, file.settings, "settings"), profile.settings, f"profiles.{chosen.profile}.settings"
    )
    rows = {}
    for name, row in file.rows.items():
        own = lay(common, row.settings, f"rows.{name}.settings")
        own = lay(own, profile.rows.get(name, {}), f"profiles.{chosen.profile}.rows.{name}")
        rows[name] = build_config(inline_dataset(own.overridden(overrides), Path()))
    base = build_config(inline_dataset(common.overridden(overrides), Path()))
    return Study(path, file, chosen.profile, base, rows, chosen.seeds or profile.seeds or file.seeds)


class _Chosen(Section):
    """What the command line says about the study itself."""

    profile: str | None = None
    seeds: Seeds | None = None


def _split_settings(path: Path, file: StudyFile, settings: Sequence[str]) -> tuple[_Chosen, list[str]]:
    of_study, overrides = {}, []
    for text in settings:
        key, _, value = text.partition("=")
        if key in _Chosen.model_fields:
            of_study[key] = parse_scalar(value)
        elif key in ("train.seed", "name"):
            hint = "give seeds=[...] instead" if key == "train.seed" else "a run is named after its row"
            raise InputError(f"setting '{text}': {hint}")
        else:
            overrides.append(text)
    try:
        chosen = _Chosen.model_validate(of_study)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"setting '{first['loc'][0]}': {_message(first)}") from None
    if chosen.profile is None and "paper" in file.profiles:
        chosen = chosen.model_copy(update={"profile": "paper"})
    if chosen.profile is not None and chosen.profile not in file.profiles:
        known = (
            f"nearest: {nearest(chosen.profile, file.profiles)}" if file.profiles else "it has no profiles"
        )
        raise InputError(f"{path}: no profile '{chosen.profile}'; {known}")
    return chosen, overrides


def _settings(study: Source, tree: Mapping[str, Any], keys: str) -> Source:
    """Dotted or nested settings that stand under `keys` of a study file, as a tree that knows its places."""
    nested: dict[str, Any] = {}
    for key, value in tree.items():
        for part in reversed(str(key).split(".")):
            value = {part: value}
        nested = merge(nested, value)
    prefix = keys + "."
    places = {key.removeprefix(prefix): at for key, at in study.places.items() if key.startswith(prefix)}
    return inline_dataset(Source(study.path, nested, places), study.path.parent)


def _check(source: Source) -> StudyFile:
    """The file against its schema, and its names against each other."""
    try:
        file = StudyFile.model_validate(source.tree)
    except ValidationError as error:
        raise InputError(_explain(error, source)) from None

    def known(name: str, names: Mapping[str, Any], what: str, *keys: str) -> None:
        if name not in names:
            place = source.place(keys)
            raise InputError(
                f"{place}: {'.'.join(keys)}: no {what} '{name}'; nearest: {nearest(name, names)}"
            )

    known(file.baseline, file.rows, "row", "baseline")
    for profile_name, profile in file.profiles.items():
        for row in profile.rows:
            known(row, file.rows, "row", "profiles", profile_name, "rows", row)
    for name, row in file.rows.items():
        if row.paper is None:
            continue
        for metric in row.paper.figures:
            known(metric, file.columns, "column", "rows", name, "paper", "figures", metric)
            if file.columns[metric].paper is None:
                where = source.place(["columns", metric])
                raise InputError(
                    f"{where}: columns.{metric}: row '{name}' has a figure of the paper, so `paper:`, "
                    "the paper's heading of this column, is expected"
                )
        if (row.paper.table or file.table) is None:
            raise InputError(
                f"{source.place(['rows', name, 'paper'])}: rows.{name}.paper: figures without a table: "
                "give `table:` here or for the study"
            )
    return file


def _explain(error: ValidationError, source: Source) -> str:
    first = error.errors()[0]
    keys = [str(key) for key in first["loc"] if key != "[key]"]
    place, key = source.place(keys), ".".join(keys)
    if first["type"] == "extra_forbidden":
        section = {
            1: StudyFile,
            3: {"rows": Row, "columns": Column, "profiles": Profile}.get(keys[0]),
            4: PaperRow,
        }
        fields = section[len(keys)].model_fields
        return f"{place}: no key '{key}' in a study; nearest: {nearest(keys[-1], fields)}"
    return f"{place}: {key}: {_message(first)}"


def _message(error: Mapping[str, Any]) -> str:
    shown = "" if isinstance(error["input"], Mapping) else f" (given: {error['input']!r})"
    return f"{error['msg'].removeprefix('Value error, ')}{shown}"
