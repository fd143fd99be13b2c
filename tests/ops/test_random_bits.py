"""Philox-4x32-10 against the known answers of its authors' library, and its forms against each other."""

import pytest
import torch

from mpformer.ops.kernels import cpu_library
from mpformer.ops.random_bits import random_bits, random_bits_reference

# key, counter and result of Random123's own tests
KNOWN = [
    ([0, 0], [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 2, [2**32 - 1] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0xA4093822, 0x299F31D0],
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def signed(words):
    return torch.tensor(words).where(torch.tensor(words) < 2**31, torch.tensor(words) - 2**32).int()


def philox(key, counter):
    """By hand, with Python's integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        low, high = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = high >> 32 ^ b ^ k0, high & 0xFFFFFFFF, low >> 32 ^ d ^ k1, low & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


@pytest.mark.parametrize("form", [random_bits, random_bits_reference])
@pytest.mark.parametrize(("key", "counter", "result"), KNOWN)
def test_the_known_answers(form, key, counter, result):
    """Those whose block can be reached: the first words of a call are at block 0."""
    assert philox(key, counter) == result
    if counter[0] == 0:
        stream = signed([*key, *counter[2:]])[None]
        assert torch.equal(form(stream, counter[1], 4)[0], signed(result))


def streams(count=7):
    return torch.randint(
        -(2**31), 2**31, (count, 4), dtype=torch.int32, generator=torch.Generator().manual_seed(0)
    )


def test_numbers_are_the_words_of_their_blocks():
    _, _, result = KNOWN[0]
    assert torch.equal(random_bits(torch.zeros(1, 4, dtype=torch.int32), 0, 4)[0], signed(result))
    own = streams(2)
    for stream, got in zip((own.long() & 0xFFFFFFFF).tolist(), random_bits(own, 5, 10)):
        blocks = [philox(stream[:2], [block, 5, *stream[2:]]) for block in range(3)]
        assert torch.equal(got, signed([word for block in blocks for word in block])[:10])


@pytest.mark.parametrize("count", [0, 1, 4, 63, 64, 65, 256, 1001])
def test_the_compiled_form_is_the_plain_one(count):
    library = cpu_library(torch.zeros(1))
    if library is None:
        pytest.skip("no compiled CPU kernel")
    for own in (streams(), streams(0), streams(6)[::2]):
        assert torch.equal(library.points.random_bits(own, 3, count), random_bits_reference(own, 3, count))


def test_a_part_of_the_numbers_is_their_beginning():
    assert torch.equal(random_bits(streams(), 0, 50), random_bits(streams(), 0, 200)[:, :50])


def test_shapes_are_known_without_values():
    assert random_bits(streams().to("meta"), 0, 9).shape == (7, 9)
