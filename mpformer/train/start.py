"""The weights that a run starts from: what is wrong with them is told before Ray starts. Imports no ray."""

from __future__ import annotations

from pathlib import Path

from mpformer.config import Config
from mpformer.model.weights.checkpoints import complete
from mpformer.model.weights.fetching import Attempt
from mpformer.model.weights.hub import hub_url
from mpformer.model.weights.named import require_reachable
from mpformer.tracking.run_dir import RunDir


def fetch_weights(config: Config, run_dir: Path) -> None:
    """Fetch the weights of a backbone that a new run starts from; see that those of `train.init` can be.

    Nothing for a run that has begun or goes on from another, which has weights of its own (call it after the
    run's mirror has brought what it has). torch is loaded for a backbone alone. Raises `InputError` as
    `backbone.fetch_pretrained` does, `RunError` where the weights of `train.init` are not reachable.
    """
    if RunDir(run_dir).finished or complete(run_dir) or config.train.resume_from is not None:
        return
    if config.train.init is not None:
        require_reachable(config.train.init)
        return
    pretrained = config.model.backbone.pretrained
    if pretrained is None or not isinstance(config.model.architecture, str):
        return  # an architecture from outside builds what it likes
    hub = None if Path(pretrained).is_file() else Attempt(hub_url())  # while torch is loaded
    from mpformer.model.backbone import fetch_pretrained

    fetch_pretrained(config.model.backbone, hub)
