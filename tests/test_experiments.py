"""Every shipped recipe, data-set file and study, against the schema and against each other."""

import functools
import itertools
from pathlib import Path

import pytest
import yaml

from mpformer.ablation.plan import changes, plan_text
from mpformer.ablation.spec import Study, load_study, split_column
from mpformer.config import Data, config_hash, load_config, read_dataset, run_name

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
RECIPES = sorted(EXPERIMENTS.glob("recipes/*.yaml"))
STUDIES = [
    EXPERIMENTS / "quickstart.yaml",
    EXPERIMENTS / "model-family.yaml",
    *sorted(EXPERIMENTS.glob("ablations/*.yaml")),
]


@functools.cache
def study_of(path: Path, *settings: str) -> Study:
    """A study, read once for all tests."""
    return load_study(path, settings)


def name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_every_recipe_loads(path):
    config = load_config(path)
    assert config.name == path.stem
    assert run_name(config).startswith(path.stem)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("data/*.yaml")), ids=name)
def test_every_data_set_file_loads(path):
    assert Data.model_validate({"dataset": read_dataset(path).tree}).dataset.name


@pytest.mark.slow  # PyYAML reads 1 kB in a millisecond
@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_every_study_and_profile_loads_and_its_rows_differ(path):
    profiles = [[], *([f"profile={p}"] for p in study_of(path).file.profiles)]
    for settings in profiles:
        study = study_of(path, *settings)
        rows = [
            (study.file.parts_of(row), *sorted((k, str(v)) for k, v in changes(study, row).items()))
            for row in study.rows
        ]
        if study.profile != "smoke":  # where several backbones have one small counterpart
            assert len(set(rows)) == len(rows), "two rows with the same settings"
        assert len({trial.run_dir for trial in study.trials()}) == len(study.runs) * len(study.seeds)
        assert study.name in plan_text(study)


def test_the_quickstart_compares_mask2former_with_mp_former_and_nothing_else():
    study = study_of(EXPERIMENTS / "quickstart.yaml")
    baseline, ours = study.runs["mask2former", ""], study.runs["mp-former", ""]
    assert study.file.baseline == "mask2former"
    assert baseline.model.pilot.queries == 0
    assert ours.model.pilot.queries > 0
    assert ours.model.pilot.layer_numbers(ours.model.decoder.layers) == tuple(
        range(1, ours.model.decoder.layers + 1)
    )
    assert ours.model.pilot.label_noise == 0.2
    assert [(noise.kind, noise.ratio) for noise in ours.model.pilot.noise] == [("point", 0.2)]
    without_pilots = {"pilot": None}
    assert baseline.model.model_copy(update=without_pilots) == ours.model.model_copy(update=without_pilots)
    assert (baseline.data, baseline.train, baseline.evaluate) == (ours.data, ours.train, ours.evaluate)
    assert ours.evaluate.at_start  # the table has the untrained model beside the rows


# --- the papers' figures --------------------------------------------------------------------------


def figures() -> dict[tuple[str, str], list[tuple[float, str]]]:
    """By (identity of the run at the paper's scale, metric): every figure that stands for it, and where."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for path in STUDIES:
        study = study_of(path)
        for (row, part), config in study.runs.items():
            for column in study.file.columns:
                of_part, metric = split_column(column)
                figure = study.paper_figure(row, column) if of_part == part else None
                if figure and metric.startswith("val/"):
                    run = f"{config_hash(config)} {config.evaluate.semantic}"
                    found.setdefault((run, metric), []).append(figure)
    return found


def disagreements() -> list[dict]:
    return yaml.safe_load((EXPERIMENTS / "disagreements.yaml").read_text())


def test_a_figure_in_two_tables_is_the_same_or_a_listed_disagreement():
    listed = {
        (metric, *sorted(pair))
        for entry in disagreements()
        for metric, pair in entry.get("figures", {}).items()
    }
    twice = 0
    for (_, metric), places in figures().items():
        for (a, here), (b, there) in itertools.combinations(places, 2):
            twice += here != there
            assert a == b or (metric, *sorted((a, b))) in listed, f"{metric}: {here}: {a}; {there}: {b}"
    assert twice > 20, "no figure stands in two tables: the comparison is empty"


def test_every_disagreement_says_where_it_stands_and_how_it_is_read():
    for entry in disagreements():
        assert set(entry) <= {"what", "where", "reading", "figures"}
        assert all(entry[key] for key in ("what", "reading"))
        assert len(entry["where"]) > 1


@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_every_figure_stands_in_the_paper_s_text(path):
    """Each figure is a number of the named paper's text, and each study has the table's name."""
    papers = ROOT.parent / "shared" / "papers"
    if not papers.is_dir():
        pytest.skip("needs ../shared/papers")
    texts = {
        "MP-Former": papers / "mp-former.txt",
        "Mask2Former": papers / "mask2former.txt",
        "MaskFormer": papers / "maskformer.txt",
    }
    study = study_of(path)
    for row, column in itertools.product(study.rows, study.file.columns):
        if figure := study.paper_figure(row, column):
            value, where = figure
            text = texts[where.split(",")[0]].read_text()
            assert f"{value:g}" in text or f"{value:.1f}" in text, f"{value} is nowhere in the text: {where}"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("ablations/*.yaml")), ids=name)
def test_every_row_has_a_plan_at_every_size(path):
    profiles = study_of(path).file.profiles
    assert not profiles or set(profiles) == {"paper", "mini", "smoke"}
    for settings in [[f"profile={profile}"] for profile in profiles] or [[]]:
        study = study_of(path, *settings)
        text = plan_text(study)
        assert f"= {len(study.trials())} runs" in text
        if study.profile in ("paper", None):
            assert "steps" in text
