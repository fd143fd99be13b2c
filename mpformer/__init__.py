"""mpformer: experiments with mask-piloted segmentation transformers.

Importing the package loads neither torch nor ray: each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpformer.config import load_config
    from mpformer.evaluate.inference import segment
    from mpformer.model.architecture import build_model
    from mpformer.model.weights.loading import load, load_weights

__version__ = "0.2.0"
"""The one place of the version number; pyproject.toml reads it here."""

_WHERE = {
    "load": "mpformer.model.weights.loading",
    "load_config": "mpformer.config",
    "build_model": "mpformer.model.architecture",
    "load_weights": "mpformer.model.weights.loading",
    "segment": "mpformer.evaluate.inference",
}
_MODULES = ("ops",)

__all__ = ["build_model", "load", "load_config", "load_weights", "ops", "segment"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"mpformer.{name}")
    raise AttributeError(f"module 'mpformer' has no attribute {name!r}")


def __dir__() -> list[str]:
    """With the names that are not imported yet, for `help(mpformer)` and completion."""
    return sorted({*globals(), *__all__})
