"""The convolutional pixel decoders against loops over cells, in float64."""

import math

import pytest
import torch
from torch import nn

from mpformer.config.model import PixelDecoder
from mpformer.model.convolutional import CONVOLUTIONAL, DeformableConv

pytestmark = pytest.mark.slow

C, CHANNELS = 4, (3, 4, 5, 6)
SIZES = ((16, 24), (8, 12), (4, 6), (2, 3))


def convolve(conv: nn.Conv2d, x):
    """x [C,h,w], zero outside; every tap of every cell by itself."""
    kernel = conv.kernel_size[0]
    _, h, w = x.shape
    out = torch.zeros(conv.out_channels, h, w).double()
    for y in range(h):
        for column in range(w):
            for tap in range(kernel * kernel):
                at_y, at_x = y + tap // kernel - kernel // 2, column + tap % kernel - kernel // 2
                if 0 <= at_y < h and 0 <= at_x < w:
                    out[:, y, column] += conv.weight[:, :, tap // kernel, tap % kernel] @ x[:, at_y, at_x]
    return out if conv.bias is None else out + conv.bias[:, None, None]


def normalize(norm: nn.GroupNorm, x):
    out = torch.zeros_like(x)
    per_group = x.shape[0] // norm.num_groups
    for group in range(norm.num_groups):
        part = slice(group * per_group, (group + 1) * per_group)
        mean = x[part].mean()
        deviation = ((x[part] - mean) ** 2).mean().add(norm.eps).sqrt()
        out[part] = (x[part] - mean) / deviation
    return out * norm.weight[:, None, None] + norm.bias[:, None, None]


def block(sequence, x):
    """Convolution, norm, and ReLU if there is one."""
    x = normalize(sequence[1], convolve(sequence[0], x))
    return x.clamp(min=0) if len(sequence) == 3 else x


def nearest(x):
    """Twice the size, each cell four times."""
    return x.repeat_interleave(2, 1).repeat_interleave(2, 2)


def value_at(x, at_y, at_x):
    """Bilinear value [C] of x [C,h,w] at cell coordinates; zero outside."""
    low_y, low_x = math.floor(at_y), math.floor(at_x)
    value = torch.zeros(x.shape[0]).double()
    for y in (low_y, low_y + 1):
        for column in (low_x, low_x + 1):
            if 0 <= y < x.shape[1] and 0 <= column < x.shape[2]:
                value += (1 - abs(at_y - y)) * (1 - abs(at_x - column)) * x[:, y, column]
    return value


def bilinear(x):
    """Twice the size, cell centres aligned, edges repeated."""
    _, h, w = x.shape
    out = torch.zeros(x.shape[0], 2 * h, 2 * w).double()
    for y in range(2 * h):
        for column in range(2 * w):
            at_y = min(max((y + 0.5) / 2 - 0.5, 0), h - 1)
            at_x = min(max((column + 0.5) / 2 - 0.5, 0), w - 1)
            out[:, y, column] = value_at(x, at_y, at_x)
    return out


def lowered(x):
    """Half the size: the largest of the 3x3 cells around every second one."""
    _, h, w = x.shape
    out = torch.zeros(x.shape[0], h // 2, w // 2).double()
    for y in range(h // 2):
        for column in range(w // 2):
            window = x[:, max(2 * y - 1, 0) : 2 * y + 2, max(2 * column - 1, 0) : 2 * column + 2]
            out[:, y, column] = window.amax((1, 2))
    return out


def looped_fpn(decoder, features):
    x = block(decoder.outputs[0], features[3])
    maps = [x]
    for i in range(3):
        x = block(decoder.outputs[i + 1], block(decoder.laterals[i], features[2 - i]) + nearest(x))
        maps.append(x)
    return maps


def fpn(decoder, features):
    maps = looped_fpn(decoder, features)
    return convolve(decoder.mask_features, maps[3]), maps[:3]


def semantic_fpn(decoder, features):
    maps = looped_fpn(decoder, features)
    total = torch.zeros_like(maps[3])
    for x, convs, doublings in zip(maps, decoder.raising, (3, 2, 1, 0)):
        for i, conv in enumerate(convs):
            x = block(conv, x)
            if i < doublings:
                x = bilinear(x)
        total = total + x
    return convolve(decoder.mask_features, total), maps[:3]


def mixed(node, *maps):
    weights = [max(float(w), 0.0) for w in node.weight]
    return block(node.conv, sum(w * x for w, x in zip(weights, maps)) / (sum(weights) + 1e-4))


def bifpn(decoder, features):
    p4, p8, p16, p32 = (block(lateral, f) for lateral, f in zip(decoder.laterals, features))
    middle16 = mixed(decoder.down[2], p16, nearest(p32))
    middle8 = mixed(decoder.down[1], p8, nearest(middle16))
    out4 = mixed(decoder.down[0], p4, nearest(middle8))
    out8 = mixed(decoder.up[0], block(decoder.short_cuts[0], features[1]), middle8, lowered(out4))
    out16 = mixed(decoder.up[1], block(decoder.short_cuts[1], features[2]), middle16, lowered(out8))
    out32 = mixed(decoder.up[2], p32, lowered(out16))
    return convolve(decoder.mask_features, out4), [out32, out16, out8]


def deform(conv: DeformableConv, x, guide):
    moves = convolve(conv.moves, guide)
    _, h, w = x.shape
    out = torch.zeros(C, h, w).double()
    width = C // conv.groups
    for group in range(conv.groups):
        part = slice(group * width, (group + 1) * width)
        for tap in range(9):
            dx, dy, weight = moves[27 * group + 3 * tap : 27 * group + 3 * tap + 3]
            for y in range(h):
                for column in range(w):
                    at_y = y + tap // 3 - 1 + float(dy[y, column])
                    at_x = column + tap % 3 - 1 + float(dx[y, column])
                    value = torch.sigmoid(weight[y, column]) * value_at(x[part], at_y, at_x)
                    out[:, y, column] += conv.conv.weight[:, part, tap // 3, tap % 3] @ value
    return out + conv.conv.bias[:, None, None]


def fapn(decoder, features):
    x = block(decoder.top, features[3])
    maps = [block(decoder.outputs[0], x)]
    for i in range(3):
        select, feature = decoder.select[i], features[2 - i]
        mean = feature.mean((1, 2))
        importance = torch.sigmoid(select.importance.weight[:, :, 0, 0] @ mean + select.importance.bias)
        selected = block(select.project, feature + feature * importance[:, None, None])
        raised = bilinear(x)
        guide = block(decoder.guide[i], torch.cat((selected, 2 * raised)))
        x = selected + deform(decoder.align[i], raised, guide).clamp(min=0)
        maps.append(block(decoder.outputs[i + 1], x))
    return convolve(decoder.mask_features, maps[3]), maps[:3]


LOOPED = {"fpn": fpn, "semantic_fpn": semantic_fpn, "bifpn": bifpn, "fapn": fapn}


@pytest.mark.parametrize("last_kernel", [1, 3])
@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_a_pixel_decoder_is_its_loops(kind, last_kernel):
    torch.manual_seed(0)
    config = PixelDecoder(kind=kind, channels=C, heads=2, last_kernel=last_kernel)
    decoder = CONVOLUTIONAL[kind](config, CHANNELS).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.4)
        features = [torch.randn(c, h, w).double() for c, (h, w) in zip(CHANNELS, SIZES)]
        pixels, memories = decoder(tuple(f[None] for f in features))
        wanted_pixels, wanted_memories = LOOPED[kind](decoder, features)
    torch.testing.assert_close(pixels[0], wanted_pixels)
    assert [tuple(m.shape[2:]) for m in memories] == [SIZES[3], SIZES[2], SIZES[1]]
    for got, wanted in zip(memories, wanted_memories):
        torch.testing.assert_close(got[0], wanted)


def test_a_deformable_convolution_starts_as_half_a_convolution():
    torch.manual_seed(0)
    deformable = DeformableConv(C, 2).double()
    x = torch.randn(1, C, 5, 6).double()
    plain = nn.functional.conv2d(x, deformable.conv.weight, None, padding=1)
    with torch.no_grad():
        torch.testing.assert_close(deformable(x, torch.randn_like(x)), plain / 2)


def test_offsets_keep_their_digits_in_half_precision():
    """At column 300 bfloat16 has steps of 2: computed so, taps would miss their cells."""
    torch.manual_seed(0)
    deformable = DeformableConv(C, 2)
    x = torch.randn(1, C, 3, 320)
    with torch.no_grad():
        exact = deformable(x, x)
        with torch.autocast("cpu", torch.bfloat16):
            half = deformable(x, x)
    assert float((half - exact).abs().max()) < 0.02 * float(exact.abs().max())
