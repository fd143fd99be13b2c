"""The settings of the model and its losses: `Config.model` (see `mpformer.config`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_serializer,
    model_validator,
)

from mpformer.config.members import words
from mpformer.config.nearest import nearest
from mpformer.config.plugins import BY_NAME, PLUGIN_TAG, Options, Plugin, Reference
from mpformer.config.plugins import kind as by_kind
from mpformer.config.section import Count, Described, Fraction, NonNegative, Positive, Section
from mpformer.plugin import is_reference
from mpformer.types import MEMORY_STRIDES

Channels: TypeAlias = tuple[float, float, float]
Scales: TypeAlias = tuple[Positive, Positive, Positive]


class Backbone(Section):
    name: str = "resnet50"
    """A timm model with `features_only`."""
    pretrained: str | None = "tv_in1k"
    """timm's tag of the pretrained weights, a path of a weights file, or null for random weights."""
    norm: Literal["frozen_bn", "bn", "group_norm"] = "frozen_bn"
    """Normalisation of a convolutional backbone: frozen statistics (the papers), live ones, or GroupNorm."""
    mean: Channels | None = None
    """What is subtracted from each channel of an image (red, green, blue; 0..255); null: what the pretrained
    weights were trained with, by timm; ImageNet's for random weights."""
    std: Scales | None = None
    """What each channel is then divided by; null: as for `mean`."""
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 0
    """How many stages get no gradient; a ResNet's first is its stem, Swin's first includes the embedding."""
    output_norms: bool | None = None
    """A LayerNorm on each of the four maps; null: as in the official models (Swin has them)."""
    drop_path: Fraction = 0.0
    """Stochastic depth of the last block, rising linearly from 0 at the first (Swin recipes: 0.3)."""

    @model_validator(mode="after")
    def _check(self) -> Backbone:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean, std: both or neither; images are normalised with the two")
        return self


class PixelDecoder(Section):
    kind: Literal["deformable", "fpn", "semantic_fpn", "bifpn", "fapn"] | Reference = "deformable"
    """Multi-scale deformable attention over strides 32, 16, 8, then one FPN step to stride 4; or one of the
    convolutional pixel decoders of Mask2Former's Table 4e, of which `fpn` is MaskFormer's; or a plug-in
    `package.module:Name`."""
    options: Options = Field(default_factory=dict)
    """Keyword arguments of a plug-in."""
    layers: Annotated[int, Field(ge=0)] = 6
    """Layers of deformable attention; the convolutional decoders have none."""
    channels: Count = 256
    """Channels of the feature levels; also the decoder's memory and the mask features."""
    heads: Count = 8
    """Attention heads of a layer; `channels` divides by them."""
    points: Count = 4
    """Sampling points per head and level."""
    ffn: Count = 1024
    """Hidden units of a layer's feed-forward network."""
    last_kernel: Literal[1, 3] | None = None
    """Kernel of the last convolution, which gives the mask features. MaskFormer prints 1; its released code,
    whose FLOPs both papers print, has 3. null: 1 for deformable, 3 for the others."""

    @model_validator(mode="after")
    def _check(self) -> PixelDecoder:
        if self.options and not is_reference(self.kind):
            raise ValueError(f"options: {self.kind} has none; they are those of a plug-in")
        return self


class Decoder(Section):
    queries: Count = 100
    """Queries of the matching part. Where each stands for a class (`model.output: per_pixel`,
    `loss.assignment: fixed`) there are as many as classes instead."""
    layers: Annotated[int, Field(ge=0)] = 9
    """0: predictions from the supervised queries themselves; of a per-pixel model, one convolution only."""
    heads: Count = 8
    """Attention heads of a layer; `pixel_decoder.channels` divides by them."""
    ffn: Count = 2048
    """Hidden units of a layer's feed-forward network."""
    dropout: Fraction = 0.0
    """Of attention and feed-forward networks; MaskFormer has 0.1."""
    attention: Annotated[Literal["masked", "cross", "smca", "mask_pooling"] | Plugin, BY_NAME] = "masked"
    """Cross-attention to the memory (Mask2Former Table 4c): within the query's predicted mask; everywhere;
    everywhere under a Gaussian of the query's own (SMCA); the mean of the mask's features (K-Net). Or a
    plug-in: `package.module:Name`, or that as `kind` with `options`."""
    features: Literal["round_robin", "all_scales", "stride_32", "stride_16", "stride_8"] = "round_robin"
    """The map that a layer attends to: strides 32, 16, 8 in turn (coarse to fine), all three at once
    (Mask2Former's "naive m.s.", Table 4d), or one for all layers; `stride_8` is "all large" of MP-Former's
    Table 9."""
    query_features: Literal["supervised", "learned", "zero"] = "supervised"
    """The queries' start: learned and trained by losses of their own (head 0), learned without, or zero
    (Mask2Former Table Xb)."""
    order: Literal["cross_first", "self_first"] = "cross_first"
    """Attention to the memory before attention among queries, or after it (DETR, MaskFormer)."""
    self_attention: bool = True
    """Attention among queries (MaskFormer's Table VIII leaves it out)."""
    memory: Literal["pixel_decoder", "backbone"] = "pixel_decoder"
    """Where the attended maps come from. `backbone`: its stride-32 map, projected (MaskFormer); needs
    `features: stride_32`."""
    encoder_layers: Annotated[int, Field(ge=0)] = 0
    """Transformer encoder layers (DETR's) on the backbone's stride-32 map, before pixel decoder and decoder;
    MaskFormer's panoptic ResNets have 6. Heads, ffn and dropout are the decoder's."""

    def strides(self) -> tuple[tuple[int, ...], ...]:
        """For each layer the strides of the maps that it attends to."""
        if self.features == "round_robin":
            return tuple((MEMORY_STRIDES[i % len(MEMORY_STRIDES)],) for i in range(self.layers))
        if self.features == "all_scales":
            return (MEMORY_STRIDES,) * self.layers
        return ((int(self.features.removeprefix("stride_")),),) * self.layers

    @property
    def heads_before_layers(self) -> int:
        """1 where the queries are predicted from, and trained, before the first layer (head 0), else 0."""
        return int(self.query_features == "supervised")


class NoNoise(Section):
    """The ground truth as it is."""

    kind: Literal["none"] = "none"


class PointNoise(Section):
    """Cells anywhere on the map are flipped (MP-Former section 4.3)."""

    kind: Literal["point"] = "point"
    ratio: NonNegative = 0.2
    """At most ratio times the object's area in cells are flipped."""


class ShiftNoise(Section):
    """The object is moved along both axes."""

    kind: Literal["shift"] = "shift"
    ratio: Fraction = 0.2
    """By at most ratio times half the width and height of its box; the paper prints no value."""


class ScaleNoise(Section):
    """The object is enlarged or shrunk about its centre."""

    kind: Literal["scale"] = "scale"
    ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """The factor is uniform in 1 - ratio .. 1 + ratio; the paper prints no value."""


Noise = Annotated[
    Annotated[NoNoise, Tag("none")]
    | Annotated[PointNoise, Tag("point")]
    | Annotated[ShiftNoise, Tag("shift")]
    | Annotated[ScaleNoise, Tag("scale")]
    | Annotated[Plugin, Tag(PLUGIN_TAG)],
    Discriminator(by_kind),
]


_NOISES = f"{words(Noise)}, or a list of such"


def _as_noises(value: Any) -> Any:
    values = value if isinstance(value, list | tuple) else [value]
    written = ({"kind": v} if is_reference(v) else v for v in values)
    return tuple({"kind": "point", **v} if isinstance(v, Mapping) else v for v in written)


@dataclass(frozen=True)
class PilotRules:
    """The choice at each point in which the paper and the released code differ."""

    point_flips: Literal["counted", "independent"]
    named_layers: Literal["as_named", "first_four"]
    shift: Literal["paper", "released"]
    scale: Literal["paper", "released"]
    complement: bool
    level_masks: Literal["any_pixel", "by_noise"]
    label_flip: Literal["other_class", "any_class"]
    groups: Literal["per_image", "per_batch"]
    query_positions: bool
    padded_slots: Literal["unseen", "trained"]


_FLAVOURS = {
    "paper": PilotRules(
        point_flips="counted",
        named_layers="as_named",
        shift="paper",
        scale="paper",
        complement=False,
        level_masks="any_pixel",
        label_flip="other_class",
        groups="per_image",
        query_positions=True,
        padded_slots="unseen",
    ),
    "released": PilotRules(
        point_flips="independent",
        named_layers="first_four",
        shift="released",
        scale="released",
        complement=True,
        level_masks="by_noise",
        label_flip="any_class",
        groups="per_batch",
        query_positions=False,
        padded_slots="trained",
    ),
}


class Pilot(Section):
    """Mask-piloted training (MP-Former). `queries: 0` is Mask2Former.

    Where the paper and its released code differ, `flavour` decides, unless the point's own setting does.
    """

    queries: Annotated[int, Field(ge=0)] = 100
    """n_q: pilot queries per image; floor(n_q / objects) groups. 0 switches mask piloting off."""
    layers: Literal["all", "first", "first_three"] | tuple[Count, ...] = "all"
    """Decoder layers, counted from 1, in which a pilot's attention mask is its noised ground truth."""
    noise: Annotated[tuple[Noise, ...], BeforeValidator(_as_noises), Described(_NOISES)] = (PointNoise(),)
    """Noise on the ground-truth masks: one kind, or a list of kinds that are applied one after the other. A
    plug-in is named `package.module:Name`, as `kind` where it has `options`."""
    label_noise: Fraction = 0.2
    """Probability that a pilot is fed another class's embedding (MP-Former section 4.4)."""
    assignment: Literal["hard", "match"] = "hard"
    """Each pilot reconstructs its own object, or is matched to one of its group (MP-Former Table 9)."""
    flavour: Literal["paper", "released"] = "paper"
    """Value of all settings below that are null: MP-Former as printed, or as its code was released."""
    point_flips: Literal["counted", "independent"] | None = None
    """Point noise. paper `counted`: 0 .. ratio * area cells, every number equally likely; released
    `independent`: each cell with probability ratio * area / cells."""
    named_layers: Literal["as_named", "first_four"] | None = None
    """paper `as_named`: `first` is layer 1, `first_three` layers 1 to 3; released `first_four`: both are 1
    to 4."""
    shift: Literal["paper", "released"] | None = None
    """paper: the object stays whole on the map; released: axes swapped, what leaves the map piles up at its
    border, drawn once for all layers."""
    scale: Literal["paper", "released"] | None = None
    """paper: a factor of its own for each object; released: half of the objects are enlarged, all by the same
    factor, about a centre with swapped axes, drawn once for all layers."""
    complement: bool | None = None
    """From layer 2, pilots with shift or scale noise attend to all but their mask (released: yes)."""
    level_masks: Literal["any_pixel", "by_noise"] | None = None
    """A cell of a level is on if any pixel in it is; released `by_noise`: so without shift and scale noise,
    else if its first pixel is."""
    label_flip: Literal["other_class", "any_class"] | None = None
    """A flipped label is always another class (paper), or any, its own included (released)."""
    groups: Literal["per_image", "per_batch"] | None = None
    """floor(n_q / objects) for each image (paper), or one number from the fullest image of the (micro-)batch,
    and no pilots at all where that has more than n_q objects (released)."""
    query_positions: bool | None = None
    """Whether the matching part's queries have learned positions (paper: yes, as in Mask2Former)."""
    padded_slots: Literal["unseen", "trained"] | None = None
    """Slots that an image cannot fill are attended to by no query (paper), or are zero queries of its groups,
    trained to predict no object (released)."""

    @field_serializer("noise")
    def _as_written(self, noise: tuple[Noise, ...]) -> Any:
        plain = [n.model_dump() for n in noise]
        return plain[0] if len(plain) == 1 else plain

    def rules(self) -> PilotRules:
        """The choice at each point: its own setting or, where that is null, the flavour's."""
        base = _FLAVOURS[self.flavour]
        own = {name: getattr(self, name) for name in PilotRules.__dataclass_fields__}
        chosen = {name: getattr(base, name) if value is None else value for name, value in own.items()}
        if self.queries == 0 and self.query_positions is None:
            chosen["query_positions"] = True  # without pilots it is Mask2Former
        return PilotRules(**chosen)

    @property
    def moves_objects(self) -> bool:
        """Whether the noise is, or includes, shift or scale: the released code treats their masks its way."""
        return any(isinstance(noise, ShiftNoise | ScaleNoise) for noise in self.noise)

    def layer_numbers(self, decoder_layers: int) -> tuple[int, ...]:
        """The piloted layers, counted from 1, of a model with that many attention layers."""
        every = tuple(range(1, decoder_layers + 1))
        named = {"all": every, "first": (1,), "first_three": (1, 2, 3)}
        if self.rules().named_layers == "first_four":
            named["first"] = named["first_three"] = (1, 2, 3, 4)
        chosen = named[self.layers] if isinstance(self.layers, str) else self.layers
        return tuple(sorted({i for i in chosen if i <= decoder_layers}))


@dataclass(frozen=True)
class PointCounts:
    """The points of a mask in the loss (PointRend's importance sampling)."""

    candidates: int
    """Random points, of which the `important` least certain ones are taken."""
    important: int
    total: int

    @property
    def uniform(self) -> int:
        """Random points that are taken whatever the prediction."""
        return self.total - self.important


class Loss(Section):
    class_weight: NonNegative = 2.0
    """Weight of the classes' cross-entropy, in the loss and in matching."""
    mask_weight: NonNegative = 5.0
    """Weight of `mask_loss`, in the loss and in matching."""
    dice_weight: NonNegative = 5.0
    """Weight of the dice loss, in the loss and in matching."""
    no_object_weight: NonNegative = 0.1
    """Weight of the class "no object" in the cross-entropy."""
    mask_loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """The loss and cost that `mask_weight` scales; focal (alpha 0.25, gamma 2): MaskFormer, DETR."""
    points: Count | None = 12544
    """Sampled points per mask in the loss; null computes it on full masks."""
    match_points: Count | Literal["as_loss"] | None = "as_loss"
    """Sampled points per mask in matching; null matches on full masks (Mask2Former Table 5)."""
    oversample: Annotated[float, Field(ge=1.0)] = 3.0
    """Random candidates, as a factor on `points`, among which the least certain are found."""
    importance: Fraction = 0.75
    """Share of the loss points taken where the prediction is least certain (PointRend)."""
    shared_pilot_points: bool = False
    """One set of loss points for all pilots of an object, importance-sampled by their mean prediction. It is
    faster; in the papers each pilot has points of its own, which gives other statistics."""
    padding: Literal["counted", "ignored"] = "counted"
    """Whether points in the padding of a crop count, as in the papers' recipes."""
    matching: Literal["each_head", "last_head"] = "each_head"
    """Bipartite matching at every head, or the last head's for all (fixed matching, MP-Former appendix C)."""
    assignment: Literal["bipartite", "fixed"] = "bipartite"
    """Objects to queries at least cost, or the object of class k to query k (MaskFormer Table 4). Fixed: as
    many queries as classes, and one object per class, as semantic data has."""
    match_by: Literal["masks", "boxes"] = "masks"
    """Mask and dice cost, or those of boxes (DETR; MaskFormer Table 5): every query then predicts a box,
    too, which is trained."""
    box_weight: NonNegative = 5.0
    """Weight of the boxes' L1 distance, where there are boxes."""
    giou_weight: NonNegative = 2.0
    """Weight of the boxes' generalised IoU, where there are boxes."""
    per_pixel: Literal["cross_entropy", "focal_dice"] = "cross_entropy"
    """Of a per-pixel model: cross-entropy of the pixels (weight 1), or `mask_loss` and dice of the class
    maps as if they were masks (MaskFormer section 4.4)."""
    consistency_weight: NonNegative = 0.0
    """Weight of the layer-consistency loss (MP-Former equation 6), which the paper tried and dropped."""

    def point_counts(self) -> PointCounts | None:
        """How the points of a mask in the loss are drawn; None for losses on full masks."""
        if self.points is None:
            return None
        return PointCounts(
            int(self.oversample * self.points), int(self.importance * self.points), self.points
        )

    def for_matching(self) -> Loss:
        """The same settings with `points` being those of matching."""
        if self.match_points == "as_loss":
            return self
        return self.model_copy(update={"points": self.match_points, "match_points": "as_loss"})


ARCHITECTURES = {"mask2former": "mpformer.model.segmenter:Segmenter"}
"""The class of each `model.architecture`."""
_ARCHITECTURE = f"{', '.join(ARCHITECTURES)} or {PLUGIN_TAG}"


def _check_architecture(value: str | Plugin) -> str | Plugin:
    if isinstance(value, str) and value not in ARCHITECTURES:
        raise ValueError(
            f"{', '.join(ARCHITECTURES)} or package.module:Name expected, not '{value}'; "
            f"nearest: {nearest(value, ARCHITECTURES)}"
        )
    return value


class Model(Section):
    architecture: Annotated[
        str | Plugin, BY_NAME, AfterValidator(_check_architecture), Described(_ARCHITECTURE)
    ] = "mask2former"
    """mask2former: backbone, pixel decoder and transformer decoder, which with their settings make
    Mask2Former, MP-Former and MaskFormer. Or a plug-in: `package.module:Name`, or that as `kind` with
    `options`; the sections below are its own to read."""
    output: Literal["masks", "per_pixel"] = "masks"
    """Mask classification, or class scores of each pixel: MaskFormer's PerPixelBaseline (decoder.layers 0)
    and PerPixelBaseline+ (a decoder whose query k gives the map of class k)."""
    backbone: Backbone = Backbone()
    pixel_decoder: PixelDecoder = PixelDecoder()
    decoder: Decoder = Decoder()
    pilot: Pilot = Pilot()
    loss: Loss = Loss()

    def without_pretrained(self) -> Model:
        """The same model without pretrained weights: others are loaded, or none are needed."""
        return self.with_backbone(pretrained=None)

    def with_backbone(self, **settings: Any) -> Model:
        """The same model with other settings of its backbone."""
        return self.model_copy(update={"backbone": self.backbone.model_copy(update=settings)})

    def queries(self, classes: int) -> int:
        """Queries of the matching part for a data set of that many classes."""
        by_class = self.output == "per_pixel" or self.loss.assignment == "fixed"
        return classes if by_class else self.decoder.queries

    @model_validator(mode="after")
    def _check(self) -> Model:
        for part, heads in (("pixel_decoder", self.pixel_decoder.heads), ("decoder", self.decoder.heads)):
            if self.pixel_decoder.channels % heads:
                raise ValueError(
                    f"{part}.heads: {self.pixel_decoder.channels} channels do not divide by {heads}"
                )
        if self.pixel_decoder.channels % 4:
            raise ValueError("pixel_decoder.channels: the sine position needs a multiple of 4")
        if self.architecture == "mask2former":
            self._check_mask2former()
        return self

    def _check_mask2former(self) -> None:
        decoder, loss = self.decoder, self.loss
        if not isinstance(self.pilot.layers, str) and max(self.pilot.layers, default=0) > decoder.layers:
            raise ValueError(f"pilot.layers: the decoder has layers 1 to {decoder.layers}")
        if decoder.memory == "backbone" and decoder.features != "stride_32":
            raise ValueError("decoder.memory: backbone has one map: decoder.features must be stride_32")
        no_head = not decoder.layers and not decoder.heads_before_layers
        if no_head and self.output == "masks":
            raise ValueError("decoder.layers: without layers only supervised query_features predict")
        if decoder.query_features == "zero" and not self.pilot.rules().query_positions:
            raise ValueError("decoder.query_features: zero without positions: all queries the same")
        if self.output == "per_pixel":
            if self.pilot.queries:
                raise ValueError("pilot.queries: a per-pixel model has no objects to pilot: 0 is expected")
            if loss.consistency_weight:
                raise ValueError("loss.consistency_weight: a per-pixel model has no masks: 0 is expected")
            if loss.match_by == "boxes":
                raise ValueError("loss.match_by: a per-pixel model has no boxes: masks is expected")
        if loss.assignment == "fixed" and loss.match_by == "boxes":
            raise ValueError("loss.match_by: with a fixed assignment nothing is matched: masks is expected")
