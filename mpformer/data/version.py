"""A version of the data that a run reads, from annotations and file names, without decoding images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from mpformer.config import Data
from mpformer.data import synthetic
from mpformer.data.records import Catalog


def data_version(data: Data, splits: Mapping[str, Catalog]) -> dict[str, str]:
    """Tags of a run: `data` (what was read, in words), `data_version` (twelve hexadecimal digits) and, for a
    generated set, `data_generator` (with what it was made).

    The digits cover classes, file names and annotations, for packed sets the shards' checksums and so the
    images, too; not the place of the folder.
    """
    digest = hashlib.sha256()
    for name, split in splits.items():
        digest.update(json.dumps([name, split.classes.to_dict()]).encode())
        for records in filter(None, (split.records, split.instances)):
            digest.update(records.fingerprint().encode())
    tags = {"data": ", ".join(f"{split.name}: {len(split)} images" for split in splits.values())}
    root = Path(data.place)
    if (made_with := synthetic.arguments_of(root)) is not None:
        tags["data_generator"] = json.dumps(made_with, sort_keys=True)
        digest.update(tags["data_generator"].encode())
    return tags | {"data_version": digest.hexdigest()[:12]}
