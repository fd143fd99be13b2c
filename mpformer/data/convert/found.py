"""What the reader of a form hands on: images with their objects, classes, and what the user must know."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mpformer.data.records import Polygons, Rle


@dataclass(frozen=True)
class Object:
    """One object of an image."""

    label: str
    """Its class."""
    mask: Polygons | Rle
    place: str
    """Where it was read, for messages: `labels/a.txt:3`."""


@dataclass(frozen=True)
class Picture:
    """One image and its objects."""

    image: Path | bytes
    """The file, or its content where the source embeds it."""
    name: str
    """Path of the image, relative to the source folder where it lies in it; `/` between its parts."""
    height: int
    width: int
    """In pixels, as the objects' coordinates count them."""
    objects: tuple[Object, ...]
    place: str
    """The label file that names the image, for messages."""
    split: str = ""
    """train, val or test; empty where the source does not say."""


@dataclass
class Notes:
    """What was passed over or looks odd, by kind, with each place: nothing is left out without a word."""

    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str) -> None:
        """Note one more case of a kind."""
        self.places.setdefault(kind, []).append(place)

    def lines(self, most: int | None = None) -> list[str]:
        """One line per kind with its count, below it the places, at most so many of each."""
        lines = []
        for kind, places in self.places.items():
            lines.append(f"{kind}: {len(places)}")
            shown = places if most is None else places[:most]
            lines += [f"  {place}" for place in shown]
            if len(shown) < len(places):
                lines.append(f"  ... and {len(places) - len(shown)} more")
        return lines


@dataclass(frozen=True)
class Options:
    """The user's choices where a form leaves something open."""

    rectangles: bool = False
    """YOLO and VOC: boxes without a mask become rectangles; otherwise they are an error."""
    attribute: str = ""
    """VIA: the region attribute that names the class; empty: the only one there is."""


@dataclass(frozen=True)
class Found:
    """A whole data set."""

    classes: tuple[str, ...]
    """In the order of their ids, which count from 1."""
    pictures: tuple[Picture, ...]
