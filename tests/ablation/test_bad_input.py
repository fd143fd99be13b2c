"""What a wrong command about a study is told: one line that says what is expected, and nothing is written."""

import socket

import pytest

from mpformer.cli.main import main

STUDY = """\
title: A study
base: recipe.yaml
columns:
  val/PQ: {title: PQ}
baseline: plain
rows:
  plain: {}
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("data: {task: panoptic}\n")
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def told(capsys, *arguments) -> tuple[int, str]:
    code = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return code, captured.err.strip()


@pytest.mark.parametrize("only", ["plan", "plain,plan"])
def test_a_row_that_is_none(study, capsys, only):
    code, line = told(capsys, "ablate", study, "--only", only)
    assert (code, line) == (2, f"mpformer: {study}: no row 'plan'; nearest: plain")


def test_no_row_at_all_is_not_all_rows(study, capsys):
    assert told(capsys, "ablate", study, "--only", "") == (2, f"mpformer: {study}: no row ''; nearest: plain")


def test_a_row_named_twice_runs_once(study, capsys):
    assert main(["ablate", str(study), "--only", "plain,plain", "--plan"]) == 0
    assert "rows x seeds: 1 x 1 (seeds 0) = 1 runs" in capsys.readouterr().out


@pytest.mark.parametrize("seeds", ["0", "[]", "-1", "[0, -1]"])
def test_no_seeds(study, capsys, seeds):
    code, line = told(capsys, "ablate", study, f"seeds={seeds}")
    assert code == 2
    assert line.startswith("mpformer: setting 'seeds': expected a list of seeds such as [0, 1, 2]")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "study.yaml:6: rows: expected lines `name: value` (given: null)"),
        (
            "  plain: {}\n  plain: {}\n",
            "study.yaml:8: not valid YAML: duplicate key 'plain'",
        ),
    ],
)
def test_rows_that_are_missing_or_there_twice(study, capsys, rows, message):
    study.write_text(STUDY.replace("  plain: {}\n", rows))
    code, line = told(capsys, "ablate", study, "--plan")
    assert (code, line) == (2, f"mpformer: {study.parent}/{message}")


def test_a_report_of_nothing(study, capsys):
    code, line = told(capsys, "report", study)
    assert code == 2
    assert "runs/study: no run of this study, with these settings: mpformer ablate" in line
    assert not (study.parent / "runs").exists()


def test_a_report_from_a_store_that_is_none(study, capsys):
    code, line = told(capsys, "report", study, "from=mlflow", "tracking.mlflow=null")
    assert (code, line) == (
        2,
        "mpformer: setting 'from=mlflow': tracking.mlflow is null: there is no store to read",
    )
    assert told(capsys, "report", study, "from=mlflow", "tracking.mlflow=mlruns")[0] == 2
    code, line = told(capsys, "report", study, "from=mlflow")
    assert code == 1
    assert line.endswith("runs/mlflow.db: there is no such file")
    assert not (study.parent / "runs").exists()


@pytest.mark.slow
def test_a_report_from_a_server_that_does_not_answer(study, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    code, line = told(capsys, "report", study, "from=mlflow", f"tracking.mlflow={uri}")
    assert (code, line) == (1, f"mpformer: MLflow {uri}: Connection refused")
