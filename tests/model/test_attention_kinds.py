"""Each attention kind and feature schedule against an obvious implementation: loops over cells, float64."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpformer.config.model import Decoder, Model, Pilot, PixelDecoder
from mpformer.model.attention import Attention, MaskPooling, ModulatedAttention
from mpformer.model.decoder import QueryDecoder
from mpformer.model.position import sine_position
from tests.model.samples import blobs, pilots_for

C, HEADS, SIZES = 8, 2, ((2, 3), (4, 6), (8, 12))
D = C // HEADS


def projections(attention):
    """(weight, bias) of queries, keys and values."""
    return list(zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)))


def looped_attention(attention, query, keys, values, allowed, bias=None):
    """One query [C] over keys and values [S,C], head by head and cell by cell; allowed [S], bias(head, s)."""
    (wq, bq), (wk, bk), (wv, bv) = projections(attention)
    q, heads = wq @ query + bq, []
    for head in range(HEADS):
        part = slice(head * D, (head + 1) * D)
        weights, mixed = [], torch.zeros(D).double()
        for s in range(len(keys)):
            score = float(q[part] @ (wk @ keys[s] + bk)[part]) / math.sqrt(D)
            score += bias(head, s) if bias else 0.0
            weights.append(math.exp(score) if allowed[s] else 0.0)
        for s in range(len(keys)):
            mixed = mixed + weights[s] / sum(weights) * (wv @ values[s] + bv)[part]
        heads.append(mixed)
    return attention.out_proj(torch.cat(heads))


def looped_smca(attention, query, keys, values, allowed, places):
    center = torch.sigmoid(attention.center(query)).tolist()
    spread = attention.spread(query).tolist()

    def bias(head, s):
        dx, dy, log_width, log_height = spread[4 * head : 4 * head + 4]
        x = (float(places[s][0]) - center[0] - dx) / math.exp(log_width)
        y = (float(places[s][1]) - center[1] - dy) / math.exp(log_height)
        return math.log(math.exp(-x * x) * math.exp(-y * y))

    return looped_attention(attention, query, keys, values, allowed, bias)


def looped_pooling(attention, query, keys, values, allowed):
    inside = [value for value, on in zip(values, allowed) if on]
    return attention.out_proj(attention.value_proj(sum(inside) / len(inside)))


def randomize(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module.double()


@pytest.mark.parametrize("kind", [Attention, ModulatedAttention, MaskPooling])
def test_weights_are_what_forward_pays(kind):
    """With values that are the identity, projected by it, the output is the weights themselves."""
    torch.manual_seed(1)
    attention = randomize(kind(C, 1))
    query, key = torch.randn(2, 3, C).double(), torch.randn(2, C, C).double()
    allowed = torch.rand(2, 3, C) < 0.6
    allowed[:, :, 0] = True
    places = torch.rand(C, 2).double()
    with torch.no_grad():
        if kind is MaskPooling:
            linears = [attention.value_proj]
        else:
            attention.in_proj_weight[2 * C :] = torch.eye(C)
            attention.in_proj_bias[2 * C :] = 0
            linears = []
        for linear in (*linears, attention.out_proj):
            linear.weight.copy_(torch.eye(C))
            linear.bias.zero_()
        out = attention(query, key, torch.eye(C).double().expand(2, -1, -1), allowed, places)
    torch.testing.assert_close(attention.weights(query, key, allowed, places), out)
    torch.testing.assert_close(out.sum(2), torch.ones(2, 3).double())
    assert not out[~allowed].any()


def decoder_of(**settings) -> QueryDecoder:
    config = Model(
        pixel_decoder=PixelDecoder(channels=C, heads=HEADS),
        decoder=Decoder(**{"queries": 4, "layers": 4, "heads": HEADS, "ffn": 6, **settings}),
        pilot=Pilot(queries=6),
    )
    torch.manual_seed(0)
    return randomize(QueryDecoder(config, classes=3, backbone_channels=C)).eval()


def looped_decoder(decoder, config, pixels, memories, pilots=None):
    """All heads (class logits, mask logits) of one image, [Q+P,...], query by query."""
    levels = {
        "round_robin": [[0], [1], [2], [0]],
        "stride_32": [[0]] * 4,
        "stride_16": [[1]] * 4,
        "stride_8": [[2]] * 4,
        "all_scales": [[0, 1, 2]] * 4,
    }[config.features]
    start = torch.zeros(4, C).double() if decoder.query_feat is None else decoder.query_feat.weight
    place = decoder.query_embed.weight
    slots = 0
    if pilots is not None:
        slots = pilots.labels.shape[1]
        start = torch.cat((start, decoder.pilot_embed.weight[pilots.labels[0]]))
        place = torch.cat((place, torch.zeros(slots, C).double()))
    x, heads = list(start), []

    def predict():
        out = [decoder.norm(one) for one in x]
        masks = [torch.einsum("c,chw->hw", decoder.mask_embed(one), pixels) for one in out]
        return torch.stack([decoder.class_embed(one) for one in out]), torch.stack(masks)

    def talk(layer):
        told = []
        for i in range(len(x)):
            seen = [
                j < 4 or (i >= 4 and bool(pilots.groups[0, i - 4] == pilots.groups[0, j - 4]))
                for j in range(len(x))
            ]
            keys, values = [a + b for a, b in zip(x, place)], x
            told.append(looped_attention(layer.self_attn, x[i] + place[i], keys, values, seen))
        return [layer.self_norm(a + b) for a, b in zip(x, told)]

    for number, layer in enumerate(decoder.layers):
        classes, masks = predict()
        if number or config.query_features == "supervised":
            heads.append((classes, masks))
        values, keys, places, looks = [], [], [], []
        for level in levels[number]:
            h, w = SIZES[level]
            sine = sine_position(h, w, C, pixels.device, pixels.dtype)
            resized = F.interpolate(masks[None], (h, w), mode="bilinear", align_corners=False)[0]
            looks.append((resized >= 0).flatten(1))
            for y in range(h):
                for column in range(w):
                    values.append(memories[level][:, y, column] + decoder.level_embed.weight[level])
                    keys.append(values[-1] + sine[y * w + column])
                    places.append(((column + 0.5) / w, (y + 0.5) / h))
        foreground = torch.cat(looks, 1)
        if config.order == "self_first":
            x = talk(layer)
        seen = []
        for i in range(len(x)):
            allowed = foreground[i] if config.attention in ("masked", "mask_pooling") else None
            if i >= 4 and pilots.attention_masks[number] is not None:
                allowed = pilots.attention_masks[number][0, i - 4]
            if allowed is None or not allowed.any():
                allowed = torch.ones(len(values), dtype=torch.bool)
            query = x[i] + place[i]
            if config.attention == "smca":
                seen.append(looped_smca(layer.cross_attn, query, keys, values, allowed, places))
            elif config.attention == "mask_pooling":
                seen.append(looped_pooling(layer.cross_attn, query, keys, values, allowed))
            else:
                seen.append(looped_attention(layer.cross_attn, query, keys, values, allowed))
        x = [layer.cross_norm(a + b) for a, b in zip(x, seen)]
        if config.order == "cross_first" and config.self_attention:
            x = talk(layer)
        x = [layer.ffn_norm(a + layer.linear2(F.relu(layer.linear1(a)))) for a in x]
    heads.append(predict())
    return heads


CASES = {
    "masked, round robin": {},
    "cross": {"attention": "cross"},
    "smca": {"attention": "smca"},
    "mask pooling": {"attention": "mask_pooling"},
    "all scales": {"features": "all_scales"},
    "all scales, smca": {"features": "all_scales", "attention": "smca"},
    "1/32": {"features": "stride_32"},
    "1/16": {"features": "stride_16"},
    "1/8": {"features": "stride_8"},
    "learned": {"query_features": "learned"},
    "zero": {"query_features": "zero"},
    "self first": {"order": "self_first"},
    "no self-attention": {"self_attention": False},
    "piloted plain decoder": {
        "attention": "cross",
        "order": "self_first",
        "query_features": "zero",
        "features": "stride_32",
    },
}


@pytest.mark.parametrize("piloted", [False, True], ids=["matching part", "with pilots"])
@pytest.mark.parametrize("case", CASES)
def test_the_decoder_is_its_loops(case, piloted):
    settings = CASES[case]
    decoder = decoder_of(**settings)
    torch.manual_seed(2)
    pixels = torch.randn(1, C, 16, 24).double()
    memories = tuple(torch.randn(1, C, h, w).double() for h, w in SIZES)
    pilots = None
    if piloted:
        config = Model(
            pixel_decoder=PixelDecoder(channels=C, heads=HEADS),
            decoder=Decoder(**{"queries": 4, "layers": 4, "heads": HEADS, **settings}),
            pilot=Pilot(queries=6, layers=(1, 3)),
        )
        pilots = pilots_for([blobs(2)], config)
    with torch.no_grad():
        out = decoder(pixels, memories, pilots)
        config = Decoder(**settings)
        wanted = looped_decoder(decoder, config, pixels[0], [m[0] for m in memories], pilots)
        assert len(out.heads) == len(wanted) == 4 + config.heads_before_layers
        for i, (class_logits, mask_logits) in enumerate(wanted):
            parts = [out.heads[i]] if pilots is None else [out.heads[i], out.pilots[i]]
            got_class = torch.cat([p.class_logits[0] for p in parts])
            got_mask = torch.cat([p.mask_logits[0] for p in parts])
            torch.testing.assert_close(got_class, class_logits, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(got_mask, mask_logits, atol=1e-6, rtol=1e-6)
        if pilots is None:
            (last,) = decoder(pixels, memories, all_heads=False).heads
            torch.testing.assert_close(last.mask_logits, out.heads[-1].mask_logits)


def test_plain_attention_predicts_no_masks_on_the_way():
    """Masks of inner heads cost a tenth of Mask2Former's FLOPs; unmasked attention needs none."""
    decoder = decoder_of(attention="cross")
    calls = []
    decoder.mask_embed.register_forward_hook(lambda *_: calls.append(1))
    memories = tuple(torch.randn(1, C, h, w).double() for h, w in SIZES)
    with torch.no_grad():
        decoder(torch.randn(1, C, 16, 24).double(), memories, all_heads=False)
    assert len(calls) == 1


def test_dropout_is_where_it_is_asked_for():
    assert {m.p for m in decoder_of(dropout=0.3).modules() if isinstance(m, nn.Dropout)} == {0.3}
