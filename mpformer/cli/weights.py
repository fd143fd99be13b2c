"""What the `mpformer weights` commands do. Heavy parts are imported where they are used."""

from __future__ import annotations

from mpformer.cli.output import say


def weights_import(source: str, out: str) -> None:
    """Another program's model as a checkpoint of ours, and what became of each tensor."""
    from mpformer.model.weights.loading import import_weights

    say(str(import_weights(source, out)))
    say(out)


def weights_export(checkpoint: str, folder: str) -> None:
    """A checkpoint as a Hugging Face folder."""
    from mpformer.model.weights.loading import export_huggingface

    export_huggingface(checkpoint, folder)
    say(folder)
