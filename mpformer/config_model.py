"""The settings of the model and its losses: `Config.model` (see `mpformer.config`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_serializer, model_validator

from mpformer.section import Count, Fraction, NonNegative, Section


class Backbone(Section):
    name: str = "resnet50"
    """A timm model with `features_only`."""
    pretrained: str | None = "tv_in1k"
    """timm's tag of the pretrained weights, a path of a weights file, or null for random weights."""
    norm: Literal["frozen_bn", "bn", "group_norm"] = "frozen_bn"
    """Normalisation of a convolutional backbone: frozen statistics (the papers), live ones, or GroupNorm."""
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 0
    """How many stages get no gradient; a ResNet's first is its stem, Swin's first includes the embedding."""
    output_norms: bool | None = None
    """A LayerNorm on each of the four maps; null: as in the official models (Swin has them)."""
    drop_path: Fraction = 0.0
    """Stochastic depth of the last block, rising linearly from 0 at the first (Swin recipes: 0.3)."""


class PixelDecoder(Section):
    kind: Literal["deformable"] = "deformable"
    """Multi-scale deformable attention over strides 32, 16, 8, then one FPN step to stride 4."""
    layers: Annotated[int, Field(ge=0)] = 6
    channels: Count = 256
    """Channels of the feature levels; also the decoder's memory and the mask features."""
    heads: Count = 8
    points: Count = 4
    """Sampling points per head and level."""
    ffn: Count = 1024


class Decoder(Section):
    queries: Count = 100
    layers: Count = 9
    heads: Count = 8
    ffn: Count = 2048
    dropout: Fraction = 0.0
    features: Literal["round_robin", "stride_32", "stride_16", "stride_8"] = "round_robin"
    """The map that a layer attends to: strides 32, 16, 8 in turn (coarse to fine), or one for all layers;
    `stride_8` is "all large" of MP-Former's Table 9."""

    def levels(self) -> tuple[int, ...]:
        """The memory that each layer reads: 0, 1, 2 for strides 32, 16, 8."""
        fixed = {"stride_32": 0, "stride_16": 1, "stride_8": 2}.get(self.features)
        return tuple(i % 3 if fixed is None else fixed for i in range(self.layers))


class NoNoise(Section):
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


Noise = Annotated[NoNoise | PointNoise | ShiftNoise | ScaleNoise, Field(discriminator="kind")]


def _as_noises(value: Any) -> Any:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple({"kind": "point", **v} if isinstance(v, Mapping) else v for v in values)


@dataclass(frozen=True)
class PilotRules:
    """Each point in which the paper and the released code differ, decided."""

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
    noise: Annotated[tuple[Noise, ...], BeforeValidator(_as_noises)] = (PointNoise(),)
    """Noise on the ground-truth masks: one kind, or a list of kinds that are applied one after the other."""
    label_noise: Fraction = 0.2
    """Probability that a pilot is fed another class's embedding (MP-Former section 4.4)."""
    assignment: Literal["hard", "match"] = "hard"
    """Each pilot reconstructs its own object, or is matched to one of its group (MP-Former Table 9)."""
    flavour: Literal["paper", "released"] = "paper"
    """What all settings below are where they are null: MP-Former as printed, or as its code was released."""
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
    """From layer 2 on, pilots with shift or scale noise may see everything but their mask (released: yes)."""
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
    """Slots that an image cannot fill are seen by nobody (paper), or are zero queries of its groups, trained
    to predict no object (released)."""

    @field_serializer("noise")
    def _as_written(self, noise: tuple[Noise, ...]) -> Any:
        plain = [n.model_dump() for n in noise]
        return plain[0] if len(plain) == 1 else plain

    def rules(self) -> PilotRules:
        """The points of difference, decided by their own settings or else by the flavour."""
        base = _FLAVOURS[self.flavour]
        own = {name: getattr(self, name) for name in PilotRules.__dataclass_fields__}
        chosen = {name: getattr(base, name) if value is None else value for name, value in own.items()}
        if self.queries == 0 and self.query_positions is None:
            chosen["query_positions"] = True  # nothing but Mask2Former
        return PilotRules(**chosen)

    def layer_numbers(self, decoder_layers: int) -> tuple[int, ...]:
        """The piloted layers, counted from 1, for a decoder of that many layers."""
        named = {"all": range(1, decoder_layers + 1), "first": (1,), "first_three": (1, 2, 3)}
        if self.rules().named_layers == "first_four":
            named["first"] = named["first_three"] = (1, 2, 3, 4)
        chosen = named[self.layers] if isinstance(self.layers, str) else self.layers
        return tuple(sorted({i for i in chosen if i <= decoder_layers}))


class Loss(Section):
    class_weight: NonNegative = 2.0
    mask_weight: NonNegative = 5.0
    dice_weight: NonNegative = 5.0
    no_object_weight: NonNegative = 0.1
    points: Count | None = 12544
    """Sampled points per mask in matching and loss; null computes both on full masks."""
    oversample: Annotated[float, Field(ge=1.0)] = 3.0
    importance: Fraction = 0.75
    """Share of the loss points taken where the prediction is least certain (PointRend)."""
    padding: Literal["counted", "ignored"] = "counted"
    """Whether points in the padding of a crop count, as in the papers' recipes."""
    matching: Literal["each_head", "last_head"] = "each_head"
    """Bipartite matching at every head, or the last head's for all (fixed matching, MP-Former appendix C)."""
    consistency_weight: NonNegative = 0.0
    """Weight of the layer-consistency loss (MP-Former equation 6), which the paper tried and dropped."""


class Model(Section):
    backbone: Backbone = Backbone()
    pixel_decoder: PixelDecoder = PixelDecoder()
    decoder: Decoder = Decoder()
    pilot: Pilot = Pilot()
    loss: Loss = Loss()

    @model_validator(mode="after")
    def _check(self) -> Model:
        for part, heads in (("pixel_decoder", self.pixel_decoder.heads), ("decoder", self.decoder.heads)):
            if self.pixel_decoder.channels % heads:
                raise ValueError(
                    f"{part}.heads: {self.pixel_decoder.channels} channels do not divide by {heads}"
                )
        if self.pixel_decoder.channels % 4:
            raise ValueError("pixel_decoder.channels: the sine position needs a multiple of 4")
        if not isinstance(self.pilot.layers, str) and max(self.pilot.layers, default=0) > self.decoder.layers:
            raise ValueError(f"pilot.layers: the decoder has layers 1 to {self.decoder.layers}")
        return self
