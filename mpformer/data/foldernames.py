"""What the names of folders and files say: which split they belong to, and what they hold."""

from __future__ import annotations

import re

_SPLIT = re.compile(
    r"(?P<train>train(ing|val)?|minitrain)|(?P<val>val(id|idation)?|minival|dev)|(?P<test>test(ing|dev)?)"
)
_SPLIT_TAIL = r"(set|split|data|images?|imgs?|labels?|masks?|annotations?|coco)?"
_TASK = r"\w*panoptic\w*|seg|segm\w*|instances?"
"""Words that name masks, but also the task that a whole data set is for."""
_OF_SETS = re.compile(rf"{_TASK}|vis")
"""Words that may name a whole data set, as YouTube-VIS."""
_MASKS = re.compile(
    rf"{_TASK}|\w*masks?|(?!unlabel)\w*label\w*|\w*annot\w*|gts?|gtfine|gtcoarse|groundtruths?|truths?"
)
"""Words in the names of folders that hold masks rather than images."""
_DRAWN = re.compile(
    r"previews?|overlays?|overlaid|thumb\w*|visuali[sz]\w*|vis|viz|drawn|predict\w*|heatmaps?"
)
"""Words in the names of folders that hold pictures made of the images."""
_IMAGES = re.compile(r"\w*(images?|imgs?|photos?|photographs?|pictures?|frames?)|jpe?gs?|rgb|raw")
"""Words in the names of folders that hold images."""
_KINDS = {"pictures made of the images": _DRAWN, "masks": _MASKS, "images": _IMAGES}
"""What a folder holds, by such words; the first of these that has one in a name."""


def split_of(name: str) -> str | None:
    """The split that a path names: in its last part, or else in the nearest folder that names one."""
    for part in reversed(name.split("/")):
        for word in re.findall(r"[a-z]+", part.casefold()):
            if (match := re.fullmatch(f"({_SPLIT.pattern}){_SPLIT_TAIL}", word)) is not None:
                return next(split for split in ("train", "val", "test") if match[split])
    return None


def held_by(name: str, json: str) -> str | None:
    """What a folder holds as its path says: "masks", "pictures made of the images" or "images", else None.

    The part that is nearest to the files decides. A word that may name a whole data set says nothing in a
    folder that has the JSON below it, too. Both paths are relative to the data set's folder.
    """
    parts, above = name.split("/"), json.split("/")[:-1]
    for depth in range(len(parts), 0, -1):
        words = re.findall(r"[a-z]+", parts[depth - 1].casefold())
        if parts[:depth] == above[:depth]:
            words = [word for word in words if not _OF_SETS.fullmatch(word)]
        for kind, pattern in _KINDS.items():
            if any(map(pattern.fullmatch, words)):
                return kind
    return None
