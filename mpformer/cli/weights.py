"""What the `mpformer weights` commands do. Heavy parts are imported where they are used."""

from __future__ import annotations

from mpformer.cli.checkpoints import chosen_file
from mpformer.cli.output import say
from mpformer.model.weights.catalogue import figures_text, named_weights
from mpformer.model.weights.named import Remote, require_reachable


def weights_import(source: str, out: str) -> None:
    """Another program's model as a checkpoint of ours, and what became of each tensor."""
    from mpformer.model.weights.loading import import_weights

    say(str(import_weights(source, out)))
    say(out)


def weights_export(checkpoint: str, folder: str) -> None:
    """A checkpoint as a Hugging Face folder."""
    require_reachable(checkpoint)
    from mpformer.model.weights.loading import export_huggingface

    export_huggingface(chosen_file(checkpoint), folder)
    say(folder)


def weights_list() -> None:
    """The published models that have a name: where they come from, their licence and published figures."""
    named = named_weights()
    width = max(map(len, named))
    figures = max(len(figures_text(weights)) for weights in named.values())
    release = None
    for name, weights in named.items():
        if weights.release is not release:
            release = weights.release
            say(f"{release.title} - licence: {release.licence} - {release.page}")
        remote = Remote.parse(name)
        here = "  (in the cache)" if remote is not None and remote.file.exists() else ""
        say(f"  {name:{width}}  {figures_text(weights):{figures}}  {weights.source}{here}")
    say(
        "A name stands wherever a checkpoint does: mpformer evaluate NAME --data FOLDER, train.init=NAME, "
        "mpformer.load(NAME); so do hf:OWNER/NAME[@REVISION] and a URL. Figures as published, in percent."
    )
