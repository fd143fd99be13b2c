"""The CUDA kernels for mask losses without a GPU: NVRTC compiles them, an emulation of blocks runs them."""

import ctypes
import dataclasses
import struct
import subprocess

import pytest
import torch

from mpformer.ops import build, nvrtc
from mpformer.ops.mask_points import Points
from mpformer.ops.mask_points_cuda import CudaPoints, PointVariant
from mpformer.ops.random_bits import random_bits_reference
from tests.ops.emulated import Emulated
from tests.ops.mask_points_exact import check, exact, integers, look_up, problem, weights

pytestmark = pytest.mark.slow

SOURCE = build.SOURCES / "mask_points.cu"
KERNELS = ["random_bits", "mask_points_forward", "mask_points_backward"]
STATIC = 10 * 1024  # bytes of shared memory that the kernels may take themselves
SOME = Points(candidates=301, important=93, uniform=27)

# ---- NVRTC


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
@pytest.mark.parametrize("variant", [(0, 0, 1), (1, 1, 0), (2, 1, 1)])
def test_compiles(monkeypatch, tmp_path, architecture, variant):
    """To machine code, with our own headers alone."""
    try:
        nvrtc.nvrtc_version()
    except nvrtc.CudaError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("MPFORMER_CACHE", str(tmp_path))
    defines = PointVariant(*variant).defines()
    code = nvrtc.compile_source(SOURCE.read_text(), architecture, defines, SOURCE.name)
    assert code[:4] == b"\x7fELF"
    assert all(kernel.encode() in code for kernel in KERNELS)
    static = static_shared_memory(code)  # from sm_90 on with the 1 KB that is reserved for the system
    assert set(KERNELS) <= set(static)
    assert 8 * 1024 < max(static.values()) <= STATIC


def static_shared_memory(code):
    """Bytes of each kernel that has some: the sizes of the sections .nv.shared.* of an ELF file."""
    (start,) = struct.unpack_from("<Q", code, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", code, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", code, start + i * size) for i in range(count)]
    names = code[sections[of_names][4] :]
    found = {names[section[0] :].split(b"\0", 1)[0].decode(): section[5] for section in sections}
    prefix = ".nv.shared."
    return {name.removeprefix(prefix): bytes_ for name, bytes_ in found.items() if name.startswith(prefix)}


# ---- Philox


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    return tmp_path_factory.mktemp("emulation")


KNOWN = [  # of Random123: key, counter, words
    ("00000000 00000000", "00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff", "ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_known_answers(folder, key, counter, words):
    source, library = folder / "philox.cpp", folder / "philox.so"
    if not library.exists():
        source.write_text(
            '#include "philox.h"\n'
            'extern "C" void words(const mpformer::Stream* s, unsigned call, unsigned block, '
            "mpformer::FourWords* to) { *to = mpformer::philox(*s, call, block); }\n"
        )
        flags = ["-std=c++17", "-shared", "-fPIC", f"-I{build.SOURCES}"]
        subprocess.run([*build.find_compiler(), *flags, str(source), "-o", str(library)], check=True)
    block, call, row, place = (int(word, 16) for word in counter.split())
    stream = (ctypes.c_uint * 4)(*(int(word, 16) for word in key.split()), row, place)
    got = (ctypes.c_uint * 4)()
    ctypes.CDLL(str(library)).words(stream, ctypes.c_uint(call), ctypes.c_uint(block), got)
    assert [f"{word:08x}" for word in got] == words.split()


# ---- emulation


@pytest.fixture(scope="module")
def emulation(folder):
    """Makes the kernels, on CPU tensors, where blocks may have that much shared memory of their own."""

    def make(shared=1 << 16):
        def load(variant):
            made.add(tuple(variant))
            return Emulated(SOURCE, KERNELS, variant.defines(), folder)

        made = set()
        kernel = CudaPoints(load, STATIC + shared)
        return kernel, made

    return make


@pytest.mark.parametrize(
    ("rows", "call", "count"), [(1, 0, 1), (3, 1, 4100), (5, 7, 2051), (2, 2**31 - 1, 8)]
)
def test_random_bits(emulation, rows, call, count):
    streams = integers(rows, 4, generator=torch.Generator().manual_seed(rows))
    got = emulation()[0].random_bits(streams, call, count)
    assert torch.equal(got, random_bits_reference(streams, call, count))
    wide = torch.cat((streams, streams), dim=1)[:, :4]
    assert torch.equal(emulation()[0].random_bits(wide, call, count), got)


@pytest.mark.parametrize(
    ("dtype", "size", "shared", "variant"),
    [
        (torch.float32, (11, 17), 1 << 16, (0, 1, 1)),
        (torch.float32, (11, 17), 1024, (0, 1, 0)),  # bands of 6 and 5 rows
        (torch.float32, (31, 50), 5000, (0, 0, 1)),
        (torch.float32, (11, 17), 140, (0, 0, 0)),  # bands of a row
        (torch.bfloat16, (12, 16), 1 << 16, (1, 1, 1)),
        (torch.float16, (7, 13), 200, (2, 1, 0)),
    ],
)
@pytest.mark.parametrize("important", [0, 93, 301])
def test_losses_and_gradients(emulation, dtype, size, shared, variant, important):
    """Two heads and images, pairs that share their streams, every use of shared memory."""
    kernel, made = emulation(shared)
    points = dataclasses.replace(SOME, important=important)
    check(kernel, *problem(dtype, size=size), points)
    assert made == {variant if important else (*variant[:2], 0)}


@pytest.mark.parametrize("limits", [False, True])
@pytest.mark.parametrize("given", [0, 70])
def test_points_that_are_given_and_points_that_do_not_count(emulation, given, limits):
    points = Points(301, given or 70, 30)
    check(emulation()[0], *problem(limits=limits, given=given), points)


@pytest.mark.parametrize("shared", [1500, 1 << 17])
@pytest.mark.parametrize("points", [Points(9001, 5003, 2049), Points(8192, 1, 0), Points(4, 2, 1)])
def test_more_points_than_threads_and_fewer(emulation, points, shared):
    check(emulation(shared)[0], *problem(pairs=2, heads=1, size=(40, 37)), points)


def test_far_logits_neither_overflow_nor_vanish(emulation):
    *_, grads = check(emulation()[0], *problem(scale=160.0), SOME)
    assert all(grad.isfinite().all() for grad in grads)


def test_small_gradients_next_to_large_ones(emulation):
    """Cell by cell: fixed point loses nothing that float32 would keep."""
    maps, pairs = problem(heads=1, pairs=1)
    maps[0][...] = 14.0  # certain: a gradient of 1e-6 where a mask is
    maps[0][:, :, :, 9:] = 0.1
    _, sums, chosen = emulation()[0].forward(maps, pairs, SOME)
    got = emulation()[0].backward(weights(pairs), maps, pairs, SOME, sums, chosen)[0]
    wanted = exact(maps, pairs, SOME, chosen, weights(pairs))[2][0]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-9)


def test_a_cell_with_all_points(emulation):
    """As large a sum as there can be: every point is wrong, in the same way and in the same place."""
    maps, pairs = problem(heads=1, pairs=1, size=(1, 1))
    maps[0][...] = -20.0
    pairs.masks[...] = True
    *_, (grad,) = check(emulation()[0], maps, pairs, Points(4096, 4000, 96))
    assert grad.abs().sum() > 0.2


def test_slices_are_read_where_they_lie_and_other_maps_are_copied(emulation):
    maps, pairs = problem(torch.bfloat16, size=(8, 16))
    wide = torch.zeros(2, 9, 8, 16, dtype=torch.bfloat16)
    wide[:, 3:8] = maps[0]
    turned = maps[1].permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    odd = torch.zeros(maps[1].numel() + 3, dtype=torch.bfloat16)[3:].view(maps[1].shape).copy_(maps[1])
    kernel = emulation()[0]
    expected = check(kernel, maps, pairs, SOME)
    for other in ([wide[:, 3:8], turned], [maps[0], odd]):
        got = check(kernel, other, pairs, SOME)
        assert all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3]))
        assert all(torch.equal(a, b) for a, b in zip(got[3], expected[3]))


@pytest.mark.parametrize("important", [17, 150])
@pytest.mark.parametrize("shared", [140, 1 << 16])
def test_of_equally_uncertain_candidates_the_first_are_kept(emulation, important, shared):
    """A flat map: nearer to zero are only those at its border, beyond which it is zero."""
    maps, pairs = problem(heads=1, pairs=3)
    maps[0][...] = -3.0
    points = dataclasses.replace(SOME, important=important)
    chosen = emulation(shared)[0].forward(maps, pairs, points)[2]
    candidates = random_bits_reference(pairs.streams, 0, points.candidates)
    for row, got in zip(pairs.table[:, 4].tolist(), chosen, strict=True):
        distance = look_up(maps[0][0, 0], candidates[row]).abs().round(decimals=9)
        order = distance.argsort(stable=True)[:important]
        assert torch.equal(got, candidates[row][order.sort().values])
        assert ((distance < 3).sum() < important) == (important == 150)


def test_the_same_bits_in_every_run(emulation):
    """Though the emulation goes through threads and blocks in opposite orders."""
    maps, pairs = problem(size=(5, 4))  # crowded cells
    kernel = emulation(70)[0]
    first, second = (check(kernel, maps, pairs, SOME) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[:3], *first[3]), (*second[:3], *second[3])))


def test_maps_without_pairs_and_losses_without_weight_get_zeros(emulation):
    maps, pairs = problem()
    kernel = emulation()[0]
    _, sums, chosen = kernel.forward(maps, pairs, SOME)
    for grad in kernel.backward(torch.zeros(2, 7), maps, pairs, SOME, sums, chosen):
        assert not grad.any()
    none = dataclasses.replace(pairs, table=pairs.table[:0])
    for grad in kernel.backward(torch.zeros(2, 0), maps, none, SOME, sums[:0], chosen[:0]):
        assert not grad.any()


def test_what_is_not_a_number_stays_in_its_pair(emulation):
    maps, pairs = problem()
    kernel = emulation()[0]
    expected = kernel.forward(maps, pairs, SOME)
    wanted = kernel.backward(weights(pairs), maps, pairs, SOME, *expected[1:])
    number, image, query = pairs.table[2, :3].tolist()
    maps[number][image, query, 5] = float("nan")
    losses, sums, chosen = kernel.forward(maps, pairs, SOME)
    others = torch.arange(len(pairs.table)) != 2
    assert losses[:, 2].isnan().all()
    assert torch.equal(losses[:, others], expected[0][:, others])
    grads = kernel.backward(weights(pairs), maps, pairs, SOME, sums, chosen)
    assert grads[number][image, query].isnan().all()
    grads[number][image, query] = wanted[number][image, query]
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted))


def test_what_the_kernels_do_not_take(emulation):
    maps, pairs = problem()
    kernel = emulation(64)[0]
    with pytest.raises(ValueError, match="of 33 heads at once"):
        kernel.forward(maps * 16 + maps[:1], pairs, SOME)
    with pytest.raises(ValueError, match="302 points to be kept of 301 candidates"):
        kernel.forward(maps, pairs, dataclasses.replace(SOME, important=302))
    nothing = (weights(pairs), maps, pairs)
    rest = (torch.zeros(7, 5), torch.zeros(7, 93, dtype=torch.int32))
    with pytest.raises(ValueError, match="predicted masks are 17 wide, the CUDA kernels take 8"):
        kernel.backward(*nothing, SOME, *rest)
    with pytest.raises(ValueError, match="1000093 points for a mask, the CUDA kernels take 524288"):
        emulation()[0].backward(*nothing, dataclasses.replace(SOME, uniform=10**6), *rest)
