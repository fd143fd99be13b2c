"""The recipes, studies and data-set files that come with the package, found by their bare names."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]

RECIPES = ("recipes", "", "ablations")
"""Folders in which the name of a recipe or a study is looked up, in this order."""
DATA_SETS = ("data",)


def experiments() -> Path:
    """The folder of the shipped files: inside the package where it is installed, beside it in a checkout."""
    inside = _PACKAGE / "experiments"
    return inside if inside.is_dir() else _PACKAGE.parent / "experiments"


def locate(name: str | Path, folder: Path = Path(), among: tuple[str, ...] = RECIPES) -> Path:
    """The file that `name` means: a path relative to `folder`, else a shipped file of this bare name.

    A bare name has no folder part; its `.yaml` may be left out. Where there is neither, the path.
    """
    path = folder / name
    if path.is_file() or len(Path(name).parts) != 1:
        return path
    return shipped_files(among).get(str(name).removesuffix(".yaml"), path)


def shipped_files(among: tuple[str, ...] = RECIPES) -> dict[str, Path]:
    """{bare name: file} of these folders, the first folder's before the others'."""
    found: dict[str, Path] = {}
    for folder in among:
        for path in sorted((experiments() / folder).glob("*.yaml")):
            found.setdefault(path.name.removesuffix(".yaml"), path)
    return found
