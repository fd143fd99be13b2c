"""Settings of the data: location, format, augmentation and loading. Imports no torch, opens no files."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from mpformer.config import plugins
from mpformer.config.plugins import PLUGIN_TAG, Options, Plugin, Reference
from mpformer.config.section import Count, Fraction, Positive, Section, setting
from mpformer.types import STRIDE, Task

Size = tuple[Count, Count]
"""(height, width) in pixels."""


def _default_tag(key: str, default: str) -> BeforeValidator:
    """Lets the key that discriminates a union be left out for its most common member."""
    return BeforeValidator(lambda value: {key: default, **value} if isinstance(value, dict) else value)


# --- data sets ------------------------------------------------------------------------------------


class Split(Section):
    """Files of one split of a COCO data set, relative to `data.root`."""

    images: str
    """Folder of the images."""
    annotations: str
    """The JSON file."""
    panoptic_masks: str | None = None
    """COCO panoptic only: folder of the id PNGs."""
    instances: str | None = None
    """COCO panoptic only: the JSON of the same images' instances, which may overlap. AP of a
    panoptic model is measured against it; null: against the things among the panoptic segments."""
    share: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Range [from, to) within 0..1: the part of the JSON's images that is the split, in the order of the
    hashes of their ids. So one JSON gives both splits: [0, 0.8] and [0.8, 1]."""


class DataSet(Section):
    """COCO's format; the classes are those of the JSON."""

    name: str = "coco"
    """What messages, pictures and reports call the data set."""
    format: Literal["coco_instance", "coco_panoptic"] = "coco_instance"
    """One JSON of polygons or run lengths, or one of segments with a PNG of ids for each image."""
    train: Split = Split(images="train2017", annotations="annotations/instances_train2017.json")
    val: Split = Split(images="val2017", annotations="annotations/instances_val2017.json")
    stuff: tuple[str, ...] | None = None
    """Names of the classes that are not countable, where the JSON's categories have no `isthing`; null: as
    `isthing` says, and without it all are countable (of panoptic data it is an error)."""
    ignore_iscrowd: bool = False
    """Take every annotation as one object. Some tools write `iscrowd: 1` for each mask that is stored as run
    lengths."""


class ClassEntry(Section):
    """One class of a data set whose files do not name the classes."""

    name: str
    """As messages, tables and pictures have it."""
    id: Annotated[int, Field(ge=0)]
    """Its value in the label maps."""
    thing: bool = False
    """Countable."""
    color: tuple[int, int, int] | None = None
    """RGB 0..255; a distinct one if not given."""
    instance_id: Annotated[int, Field(ge=1)] | None = None
    """Its value in separate instance maps, where these number the classes differently (ADE20K)."""


def _check_classes(classes: tuple[ClassEntry, ...]) -> None:
    ids = [c.id for c in classes]
    if double := next((i for i in ids if ids.count(i) > 1), None):
        raise ValueError(f"classes: duplicate id {double}")


class LabelSplit(Section):
    """Files of one split of images and label maps, relative to `data.root`."""

    images: str
    """Folder of the images, which may have folders of its own."""
    labels: str
    """Folder of the label maps, whose relative paths are those of the images but for the suffix."""
    instances: str | None = None
    """Folder of separate instance maps (ADE20K)."""
    names: str | None = None
    """A file that lists the images of the split, one name per line; null: all in the folder."""
    share: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Range [from, to) within 0..1: the part of these images that is the split, in the order of the hashes of
    their names. So one folder gives both splits: [0, 0.8] and [0.8, 1]."""

    @model_serializer(mode="wrap")
    def _without_a_whole_share(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A default share is left out: identities of runs, and what they have stored, are older than it."""
        found: dict[str, Any] = dump(self)
        if self.share == (0.0, 1.0):
            found.pop("share", None)
        return found


class LabelMaps(Section):
    """A folder of images and one of label maps."""

    name: str = "label-maps"
    """What messages, pictures and reports call the data set."""
    format: Literal["label_maps"] = "label_maps"
    train: LabelSplit
    val: LabelSplit
    image_suffix: str = ".jpg"
    """How the names of the images end."""
    label_suffix: str = ".png"
    """What the names of the label maps have in the place of `image_suffix`, such as `_mask.png`."""
    encoding: Literal["classes", "cityscapes_instances", "mapillary_instances", "ade_full"] = "classes"
    """What a pixel means. classes: the class. cityscapes_instances: below 1000 a class (a crowd if it is
    countable), else class x 1000 + number. mapillary_instances: class x 256 + number. ade_full: class
    R // 10 x 256 + G, object B."""
    classes: Annotated[tuple[ClassEntry, ...], Field(min_length=1)]
    """In the order in which they are numbered."""
    ignore: tuple[int, ...] | Literal["others"] = ()
    """Values without a class; any other value is an error. others: every value that is no class."""

    @model_validator(mode="after")
    def _check(self) -> LabelMaps:
        _check_classes(self.classes)
        if self.ignore != "others" and (both := {c.id for c in self.classes} & set(self.ignore)):
            raise ValueError(f"ignore: {min(both)} is the id of a class, too")
        return self


class MaskSplit(Section):
    """One split of a data set with a file for each object, relative to `data.root`."""

    images: str
    """A pattern such as `stage1_train/*/images/*.png`."""
    masks: str
    """The object files of an image, a pattern relative to its folder, such as `../masks/*.png`."""
    share: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Range [from, to) within 0..1: an image belongs to the split if the hash of its name lies in it."""


class MaskFiles(Section):
    """One file per object, any value but 0 being the object; all objects are of one class."""

    name: str = "mask-files"
    """What messages, pictures and reports call the data set."""
    format: Literal["mask_files"] = "mask_files"
    train: MaskSplit
    val: MaskSplit
    classes: Annotated[tuple[ClassEntry, ...], Field(min_length=1, max_length=1)]
    """The one class."""


class Packed(Section):
    """Parquet shards that `mpformer data pack` wrote; `data.root` may be `s3://...` or `gs://...`."""

    name: str = "packed"
    """What messages, pictures and reports call the data set."""
    format: Literal["packed"] = "packed"
    train: str = "train"
    """Folder of the split, relative to `data.root`."""
    val: str = "val"
    """Folder of the validation split, likewise."""


class PluginDataSet(Section):
    """A data set that a plug-in reads: `mpformer.data.records.Reader`."""

    name: str = "custom"
    """What messages, pictures and reports call the data set."""
    format: Reference
    """`package.module:Name`, importable where the command runs and on every worker."""
    options: Options = Field(default_factory=dict)
    """Keyword arguments of the reader."""


AnyDataSet = Annotated[
    Annotated[DataSet, Tag("coco_instance")]
    | Annotated[DataSet, Tag("coco_panoptic")]
    | Annotated[LabelMaps, Tag("label_maps")]
    | Annotated[MaskFiles, Tag("mask_files")]
    | Annotated[Packed, Tag("packed")]
    | Annotated[PluginDataSet, Tag(PLUGIN_TAG)],
    Discriminator(plugins.format),
    _default_tag("format", "coco_instance"),
]


# --- augmentation ---------------------------------------------------------------------------------


def _check_crop(size: Size, scale: tuple[float, float]) -> None:
    if size[0] % STRIDE or size[1] % STRIDE:
        raise ValueError(f"size: multiples of {STRIDE} expected, not {list(size)}")
    if scale[0] > scale[1]:
        raise ValueError("scale: the smaller factor first")


class LargeScaleJitter(Section):
    """Resize by a uniform factor of the target size, then a fixed crop or padding (Copy-Paste's LSJ)."""

    kind: Literal["large_scale_jitter"] = "large_scale_jitter"
    size: Size = (1024, 1024)
    """(height, width) of the crop; multiples of 32."""
    scale: tuple[Positive, Positive] = (0.1, 2.0)
    """Smallest and largest factor."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip. 0 where left and right are classes of their own."""

    @model_validator(mode="after")
    def _check(self) -> LargeScaleJitter:
        _check_crop(self.size, self.scale)
        return self


class ShortEdgeJitter(Section):
    """The semantic recipes' augmentation: jitter of the short side, fixed crop or padding, colours, flip."""

    kind: Literal["short_edge_jitter"] = "short_edge_jitter"
    size: Size = (512, 512)
    """(height, width) of the crop; multiples of 32."""
    short: Count = 512
    """Length of the short side at factor 1."""
    scale: tuple[Positive, Positive] = (0.5, 2.0)
    """Smallest and largest factor on `short`."""
    steps: Annotated[int, Field(ge=2)] | None = 16
    """Number of evenly spaced factors; null: continuous."""
    long: Count = 2048
    """Upper limit of the long side."""
    colors: bool = True
    """Jitter brightness, contrast, saturation and hue as SSD does."""
    max_category_area: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Crops in which one class has a larger share are drawn again, up to ten times; 1: never."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip. 0 where left and right are classes of their own."""

    @model_validator(mode="after")
    def _check(self) -> ShortEdgeJitter:
        _check_crop(self.size, self.scale)
        return self


class ShortestEdge(Section):
    """Standard scale augmentation, or DETR's: the whole image or a crop of it, its short side one of several.

    Sizes differ, so the samples of a global batch are padded to the largest among them.
    """

    kind: Literal["shortest_edge"] = "shortest_edge"
    shorts: Annotated[tuple[Count, ...], Field(min_length=1)] = (640, 672, 704, 736, 768, 800)
    """Lengths of the short side, one of which is drawn for each image."""
    long: Count = 1333
    """Upper limit of the long side."""
    crop: Fraction = 0.0
    """Probability of a crop first: short side to one of `crop_shorts`, then a crop within `crop_size`."""
    crop_shorts: Annotated[tuple[Count, ...], Field(min_length=1)] = (400, 500, 600)
    """Lengths of the short side before the crop."""
    crop_size: tuple[Count, Count] = (384, 600)
    """Smallest and largest side of that crop."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip. 0 where left and right are classes of their own."""


AnyAugment = Annotated[
    Annotated[LargeScaleJitter, Tag("large_scale_jitter")]
    | Annotated[ShortEdgeJitter, Tag("short_edge_jitter")]
    | Annotated[ShortestEdge, Tag("shortest_edge")]
    | Annotated[Plugin, Tag(PLUGIN_TAG)],
    Discriminator(plugins.kind),
    _default_tag("kind", "large_scale_jitter"),
]


class TestResize(Section):
    """Resizing for evaluation, the aspect kept: the short side to `short`, the long side at most `long`.

    With `long` alone the long side is brought to it; with neither the image stays as it is.
    """

    short: Count | None = 800
    """Length of the short side; null: as `long` makes it."""
    long: Count | None = 1333
    """Upper limit of the long side, or without `short` its length; null: none."""


class Data(Section):
    root: str = "."
    """Folder that holds the data set."""
    dataset: AnyDataSet = DataSet()
    """In a recipe: the path of a data-set file, relative to the recipe, or its settings in place."""
    task: Task = "instance"
    """What is learnt and measured: objects one by one (AP), all pixels with objects apart (PQ, AP, mIoU),
    or the class of each pixel (mIoU)."""
    augment: AnyAugment = LargeScaleJitter()
    """How training images are resized, cropped and flipped."""
    test_resize: TestResize = TestResize()
    bits: Annotated[int, Field(ge=8, le=16)] | None = None
    """Bits in use of 16-bit image files, such as 12 of a microscope; null: 16, and `data check` finds files
    that use fewer. Values beyond them are white."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """An image or annotation that cannot be used ends the run, or is replaced by another image and listed."""
    loader: Literal["ray", "torch", "inline"] = setting("ray")
    """Ray Data, torch's DataLoader, or the training process itself; all yield identical batches."""
    loader_processes: Count = setting(2)
    """Processes of the torch loader in each training worker."""
    prefetch: Annotated[int, Field(ge=0)] = setting(2)
    """Batches prepared ahead."""

    @property
    def place(self) -> str:
        """`root`, where it begins with `~` below the home folder of whoever reads it."""
        return os.path.expanduser(self.root)
