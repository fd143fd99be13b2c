"""Every shipped recipe, data-set file and study, against the schema and against each other."""

from pathlib import Path

import pytest

from mpformer.ablation.plan import changes, plan_text
from mpformer.ablation.spec import load_study
from mpformer.config import Data, load_config, read_dataset, run_name

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RECIPES = sorted(EXPERIMENTS.glob("recipes/*.yaml"))
STUDIES = [EXPERIMENTS / "quickstart.yaml", *sorted(EXPERIMENTS.glob("ablations/*.yaml"))]


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


@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_every_study_and_profile_loads_and_its_rows_differ(path):
    profiles = [[], *([f"profile={p}"] for p in load_study(path).file.profiles)]
    for settings in profiles:
        study = load_study(path, settings)
        rows = [tuple(sorted((k, str(v)) for k, v in changes(study, row).items())) for row in study.rows]
        assert len(set(rows)) == len(rows), "two rows with the same settings"
        assert len({trial.run_dir for trial in study.trials()}) == len(study.rows) * len(study.seeds)
        assert study.name in plan_text(study)


def test_the_quickstart_compares_mask2former_with_mp_former_and_nothing_else():
    study = load_study(EXPERIMENTS / "quickstart.yaml")
    baseline, ours = study.rows["mask2former"], study.rows["mp-former"]
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
