"""A study: rows x seeds of runs, resolved from one YAML file (its schema: `mpformer.ablation.studyfile`).

A run's settings are: base recipe < the study's `settings` < the part's < the profile's `settings` < the
row's `settings` < the row's for this part < the profile's `rows.ROW` < `key=value` of the command line.
Nothing here imports torch or ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from mpformer.ablation.columns import check_columns
from mpformer.ablation.studyfile import Profile, Row, Seeds, StudyFile, check, split_column
from mpformer.config import Config, build_config, flatten, inline_dataset, read_recipe, run_name
from mpformer.config.messages import described
from mpformer.config.section import Section
from mpformer.config.shipped import locate
from mpformer.config.yamlfile import Source, merge, nearest, parse_scalar, read_settings, value_of
from mpformer.tracking.run_dir import RunDir
from mpformer.types import InputError, Task


@dataclass(frozen=True)
class Trial:
    """One run of a study: a row (of one part) with a seed."""

    row: str
    seed: int
    config: Config
    part: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Extra MLflow tags."""

    @property
    def run_dir(self) -> Path:
        return Path(self.config.storage) / run_name(self.config)

    @property
    def finished(self) -> bool:
        """Whether the run has its summary: then it is not run again."""
        return RunDir(self.run_dir).finished

    @property
    def label(self) -> str:
        return f"{self.config.name} s{self.seed}"


@dataclass(frozen=True)
class Study:
    """A study file with a profile chosen and every row's settings resolved."""

    path: Path
    file: StudyFile
    profile: str | None
    bases: Mapping[str, Config]
    """By part: the settings that the rows have in common (recipe, study and profile, command line)."""
    runs: Mapping[tuple[str, str], Config]
    """By (row, part), in the order of the file."""
    seeds: tuple[int, ...]
    options: Mapping[str, str]
    """`plan.KEY=value` of the command line, as it is written there."""

    @property
    def name(self) -> str:
        """The file's stem and the profile: MLflow's experiment and the study's folder."""
        return f"{self.path.stem}-{self.profile}" if self.profile else self.path.stem

    @property
    def base(self) -> Config:
        """The settings of the first part, for what all parts share: storage, tracking, cluster."""
        return next(iter(self.bases.values()))

    @property
    def rows(self) -> Mapping[str, Row]:
        return self.file.rows

    @property
    def folder(self) -> Path:
        """Where the study's runs, tables and curves lie."""
        return Path(self.base.storage) / self.name

    def title(self, row: str) -> str:
        return self.file.rows[row].title or row

    def paper_figure(self, row: str, column: str) -> tuple[float, str] | None:
        """The paper's figure for a cell and the table, row and column where it stands; None without one."""
        paper = self.file.rows[row].paper
        if paper is None or column not in paper.figures:
            return None
        table, heading = paper.table or self.file.table, self.file.columns[column].paper
        return paper.figures[column], f"{table}, row '{paper.row}', column '{heading}'"

    def trials(self, only: str | None = None) -> list[Trial]:
        """Rows x seeds, all rows of one seed before the next seed; with `only`, those of one row, or of
        several that commas separate.

        Raises `InputError`, with the nearest row, where there is no such row.
        """
        wanted = list(self.rows) if only is None else only.split(",")
        for row in wanted:
            if row not in self.rows:
                raise InputError(f"{self.path}: no row '{row}'; nearest: {nearest(row, self.rows)}")
        return [
            Trial(row, seed, self._placed(config, row, part, seed), part)
            for seed in self.seeds
            for (row, part), config in self.runs.items()
            if row in wanted
        ]

    def varied(self, name: str, row: str, part: str, settings: Mapping[str, Any], seed: int) -> Trial:
        """A run named `name` that differs from a row's in some settings (dotted)."""
        source = Source(self.path, self.runs[row, part].model_dump(mode="json"), {})
        for key, value in settings.items():
            source.set(key.split("."), value, f"search.space.{key}")
        tags = {"varied_row": row, **{f"search.{key}": str(value) for key, value in settings.items()}}
        return Trial(name, seed, self._placed(build_config(source), name, part, seed), part, tags)

    def _placed(self, config: Config, row: str, part: str, seed: int) -> Config:
        train = config.train.model_copy(update={"seed": seed})
        name = f"{row}-{part}" if part else row
        return config.model_copy(update={"train": train, "name": name, "storage": str(self.folder)})


def load_study(path: str | Path, settings: Sequence[str] = ()) -> Study:
    """A study file with `profile=NAME`, `seeds=...`, `plan.KEY=...` and `key.sub=value` settings applied.

    Without `profile=`, the profile `paper` if there is one, else the base as it is. Raises `InputError`
    naming file, line, key and the nearest right name.
    """
    path = locate(path)
    source = _with_profiles(read_settings(path))
    file = check(source)
    chosen, overrides = _split_settings(path, file, settings)
    profile = file.profiles[chosen.profile] if chosen.profile else Profile()
    key = f"profiles.{chosen.profile}"
    layers = _Layers(source, file, profile, key, overrides)
    common = {part: layers.common(part) for part in file.bases}
    bases = {part: layers.build(settings) for part, settings in common.items()}
    check_columns(source, file, {part: base.data.task for part, base in bases.items()})
    runs = {
        (row, part): layers.build(layers.row(common[part], row, part))
        for row in file.rows
        for part in file.parts_of(row)
    }
    for (row, _), config in runs.items():
        if file.figures == "best" and config.train.keep.best is None:
            place = source.place(["figures"])
            raise InputError(f"{place}: figures: best needs train.keep.best in every row; {row} has none")
    if file.figures == "best" and file.search and "train.keep.best" in file.search.space:
        place = source.place(["search", "space", "train.keep.best"])
        raise InputError(f"{place}: figures: best takes one train.keep.best for all samples of a search")
    seeds = chosen.seeds or profile.seeds or file.seeds
    return Study(path, file, chosen.profile, bases, runs, seeds, chosen.plan)


@dataclass(frozen=True)
class _Layers:
    """Lays the settings of a study file over each other.

    With a profile of another size, what comes from the paper's size is adapted by `drop` and `replace`.
    """

    source: Source
    file: StudyFile
    profile: Profile
    profile_key: str
    overrides: Sequence[str]

    def common(self, part: str) -> Source:
        """The settings that the rows of a part have in common."""
        own = self.file.parts.get(part)
        keys = ["parts", part, "base"] if own else ["base"]
        common = recipe = _recipe(self.source, self.file.bases[part], keys)
        if self.profile.base is not None:
            task = recipe.tree.get("data", {}).get("task", "instance")
            kept = (*self.profile.carry, *self.profile.replace)
            at_scale = {k: v for k, v in flatten(recipe.tree).items() if _under(k, kept)}
            common = self.lay(self._profile_recipe(self.profile.base, task), at_scale, "base")
        common.tree["name"] = self.source.path.stem
        common = self.lay(common, self.file.settings, "settings")
        if own:
            common = self.lay(common, own.settings, f"parts.{part}.settings")
        return self.lay(common, self.profile.settings, f"{self.profile_key}.settings", carried=False)

    def row(self, common: Source, name: str, part: str) -> Source:
        """The settings of a row over those of its part."""
        row, of_profile = self.file.rows[name], self.profile.rows.get(name, {})
        settings = self.lay(common, row.settings, f"rows.{name}.settings")
        settings = self.lay(settings, row.parts.get(part) or {}, f"rows.{name}.parts.{part}")
        return self.lay(settings, of_profile, f"{self.profile_key}.rows.{name}", carried=False)

    def lay(self, under: Source, tree: Mapping[str, Any], keys: str, carried: bool = True) -> Source:
        if carried:
            tree = self._carried_over(tree, keys)
        return under.laid_under(_settings(self.source, tree, keys)) if tree else under

    def build(self, source: Source) -> Config:
        return build_config(inline_dataset(source.overridden(self.overrides), Path()))

    def _profile_recipe(self, base: str | Mapping[Task, str], task: Task) -> Source:
        keys = [*self.profile_key.split("."), "base"]
        if isinstance(base, str):
            return _recipe(self.source, base, keys)
        if task not in base:
            where = f"{self.source.place(keys)}: {self.profile_key}.base"
            raise InputError(f"{where}: no recipe for the task '{task}'")
        return _recipe(self.source, base[task], [*keys, task])

    def _carried_over(self, tree: Mapping[str, Any], keys: str) -> dict[str, Any]:
        if not self.profile.drop and not self.profile.replace:
            return dict(tree)
        result = {}
        for key, value in flatten(tree).items():
            if _under(key, self.profile.drop):
                continue
            if (listed := self.profile.replace.get(key)) is not None:
                known = {parse_scalar(there): here for there, here in listed.items()} | listed
                if value not in known:
                    place = self.source.place([*keys.split("."), key])
                    raise InputError(
                        f"{place}: {keys}.{key}: {value} has no counterpart in "
                        f"{self.profile_key}.replace.{key}; known: {', '.join(listed)}"
                    )
                value = known[value]
            result[key] = value
        return result


def _under(key: str, sections: Iterable[str]) -> bool:
    """Whether a setting is one of these, or lies in one of these sections."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _with_profiles(source: Source) -> Source:
    """With the file that `profiles_from` names read in, what stands under `profiles` laid over it."""
    if (name := source.tree.get("profiles_from")) is None:
        return source
    named_by = f"{source.place(['profiles_from'])}: profiles_from"
    shared = read_settings(locate(source.text("profiles_from", name), source.path.parent), named_by)

    def placed(recipe: Any, key: str) -> str:
        return str(locate(shared.text(key, recipe), shared.path.parent).resolve())

    for name, profile in shared.tree.items():
        base = profile.get("base")
        if isinstance(base, dict):
            profile["base"] = {task: placed(base[task], f"{name}.base.{task}") for task in base}
        elif base is not None:
            profile["base"] = placed(base, f"{name}.base")
    profiles = merge(shared.tree, source.tree.get("profiles") or {})
    places, texts = (
        {f"profiles.{key}": value for key, value in noted.items()} for noted in (shared.places, shared.texts)
    )
    tree = {**source.tree, "profiles": profiles}
    return Source(source.path, tree, {**places, **source.places}, {**texts, **source.texts})


def _recipe(source: Source, name: str, keys: Sequence[str]) -> Source:
    path = locate(name, source.path.parent).resolve()
    if not path.is_file():  # raises, with the nearest file
        read_settings(path, named_by=f"{source.place(keys)}: {'.'.join(keys)}")
    return read_recipe(path)


class _Chosen(Section):
    """The settings of the command line that are the study's own, not its runs'."""

    profile: str | None = None
    seeds: Seeds | None = None
    plan: dict[str, str] = Field(default_factory=dict)


def _split_settings(path: Path, file: StudyFile, settings: Sequence[str]) -> tuple[_Chosen, list[str]]:
    of_study: dict[str, Any] = {"plan": {}}
    overrides = []
    for text in settings:
        key, _, value = text.partition("=")
        if key in ("profile", "seeds"):
            of_study[key] = value_of(text, _Chosen)
        elif key.startswith("plan."):
            of_study["plan"][key.removeprefix("plan.")] = value
        elif key in ("train.seed", "name"):
            hint = "give seeds=[...] instead" if key == "train.seed" else "a run is named after its row"
            raise InputError(f"setting '{text}': {hint}")
        else:
            overrides.append(text)
    try:
        chosen = _Chosen.model_validate(of_study)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise InputError(f"setting '{key}': {described(first, _Chosen, [key])}") from None
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
    places, texts = (
        {key.removeprefix(prefix): value for key, value in noted.items() if key.startswith(prefix)}
        for noted in (study.places, study.texts)
    )
    return inline_dataset(Source(study.path, nested, places, texts), study.path.parent)


__all__ = ["Study", "Trial", "load_study", "split_column"]
