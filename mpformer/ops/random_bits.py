"""Random numbers that are a function of where they are used: Philox-4x32-10 of a key and a counter.

(Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.) Every device gives the
same bits, in any order and any part of them, so kernels make the numbers that they need where they need them.
"""

import torch
from torch import Tensor

from mpformer.ops.kernels import point_kernel

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF


@torch.library.custom_op("mpformer::random_bits", mutates_args=())
def random_bits(streams: Tensor, call: int, count: int) -> Tensor:
    """The first `count` numbers of the call-th call of each stream: [n,count] int32, all bits random.

    streams [n,4] int32: (key, key, row, place), 32 bits each. Number i is word i mod 4 of Philox-4x32-10 with
    that key at the counter (i // 4, call, row, place).
    """
    if len(streams) == 0 or count == 0:
        return streams.new_empty(len(streams), count)
    kernel = point_kernel(streams)
    if kernel is not None:
        return kernel.random_bits(streams, call, count)
    return random_bits_reference(streams, call, count)


@random_bits.register_fake
def _(streams: Tensor, call: int, count: int) -> Tensor:
    return streams.new_empty(streams.shape[0], count)


def random_bits_reference(streams: Tensor, call: int, count: int) -> Tensor:
    """`random_bits` in plain PyTorch, for devices without a kernel; its definition."""
    # int64 holds 32 bits without a sign, and a product wraps to its lower 64 bits
    key0, key1, row, place = (streams.long() & _WORD)[:, :, None].unbind(1)
    block = torch.arange((count + 3) // 4, device=streams.device)
    words = [block, torch.full((), call, dtype=torch.int64, device=streams.device), row, place]
    for number in range(_ROUNDS):
        step0, step1 = (number * step for step in _KEY_STEPS)
        low, high = (m * word for m, word in zip(_MULTIPLIERS, words[::2]))
        words = [
            _upper(high) ^ words[1] ^ ((key0 + step0) & _WORD),
            high & _WORD,
            _upper(low) ^ words[3] ^ ((key1 + step1) & _WORD),
            low & _WORD,
        ]
    bits = torch.stack(torch.broadcast_tensors(*words), dim=2).flatten(1)[:, :count]
    # the upper half of the 32-bit numbers are the negative ones of int32
    return torch.where(bits >= 2**31, bits - 2**32, bits).int()


def _upper(product: Tensor) -> Tensor:
    return (product >> 32) & _WORD
