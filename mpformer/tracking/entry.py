"""What trackers show of a run besides its metrics: where it belongs, its settings and tags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mpformer import __version__
from mpformer.config import Config, config_hash, diff
from mpformer.tracking.commit import git_commit

LONGEST_VALUE = 500
"""MLflow's limit for a parameter's value, in characters."""


@dataclass(frozen=True)
class Entry:
    """A run's place in a tracker and what tells it from other runs there."""

    experiment: str
    parent_run_id: str | None = None
    """The MLflow run of its study; None for a run outside a study."""
    base: Config = field(default_factory=Config)
    """A run's parameters are the settings in which it differs from these."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Extra tags, besides those from the run's settings and the code."""

    def parameters(self, config: Config) -> dict[str, str]:
        """Settings of model, data, training and evaluation; the others do not change what is measured."""
        return {
            key: str(value)[:LONGEST_VALUE]
            for key, (value, _) in diff(config, self.base).items()
            if key.split(".")[0] in ("model", "data", "train", "evaluate")
        }

    def all_tags(self, config: Config) -> dict[str, str]:
        """Name, seed, hash of the settings, version and commit of the code, and `tags`."""
        tags = {
            "row" if self.parent_run_id else "recipe": config.name,
            "seed": str(config.train.seed),
            "hash": config_hash(config),
            "mpformer_version": __version__,
            **self.tags,
        }
        if self.parent_run_id:
            tags["study"] = self.experiment
        if (commit := git_commit()) is not None:
            tags["git_commit"] = commit
        return tags
