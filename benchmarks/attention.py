"""Benchmark of masked attention: the decoder's call, which kernel PyTorch takes for it, and alternatives.

    PYTHONPATH=. python benchmarks/attention.py --device cuda

The decoder calls `scaled_dot_product_attention` with a boolean mask [B,1,Q,S], another one at each layer. In
PyTorch, FlashAttention takes no mask; the memory-efficient and the cuDNN kernel take one, the boolean one
converted into numbers to be added at each call. Compared: each kernel by force, the numbers made once and
given in the attention's type, flex attention, and no mask at all, which is a bound. The first call of a
shape is shown, too: cuDNN makes a plan for each shape, and the number of pilots changes from batch to batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from contenders import interleave, machine
from device_time import wait
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, CHANNELS = 8, 32
MEMORY = {"stride 32": 32 * 32, "stride 16": 64 * 64, "stride 8": 128 * 128}
"""Cells of the memories of a 1024x1024 image."""
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "plain": SDPBackend.MATH,
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query may attend, else minus infinity."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def forced(backend: SDPBackend, mask: Tensor) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def flex(mask: Tensor) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)

    def masked(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(mask[b, 0, q, k], score, -float("inf"))

    return lambda q, k, v: compiled(q, k, v, score_mod=masked)


def candidates(mask: Tensor, dtype: torch.dtype, with_flex: bool) -> dict[str, Attend]:
    made = additive(mask, dtype)
    found: dict[str, Attend] = {
        "boolean mask (ours)": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "numbers made once": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=made),
        "numbers made each time": lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=additive(mask, dtype)
        ),
        **{f"boolean mask, {name}": forced(backend, mask) for name, backend in BACKENDS.items()},
        "no mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    }
    if with_flex:
        found["flex attention"] = flex(mask)
    return found


def chosen(q: Tensor, k: Tensor, mask: Tensor | None) -> str:
    """The kernel that PyTorch takes by itself."""
    return SDPBackend(torch._fused_sdp_choice(q, k, k, mask, 0.0, False)).name


def print_rows(name: str, given: argparse.Namespace, queries: int, cells: int) -> None:
    """Forward and backward of one shape with every candidate that takes it."""
    torch.manual_seed(0)
    device, dtype = torch.device(given.device), getattr(torch, given.precision)
    q = torch.randn(given.images, HEADS, queries, CHANNELS, device=device, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(given.images, HEADS, cells, CHANNELS, device=device, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    mask = torch.rand(given.images, 1, queries, cells, device=device) < 0.2
    mask[..., 0] = True  # no row is empty
    grad = torch.randn_like(q)
    exact = F.scaled_dot_product_attention(*(t.detach().double() for t in (q, k, v)), attn_mask=mask)
    print(
        f"\n### {name}: {given.images} images, {queries} queries, {cells} cells, {given.precision}\n\n"
        f"PyTorch takes {chosen(q, k, mask)} with the mask, {chosen(q, k, None)} without one.\n"
    )
    passes: dict[str, Callable[[], None]] = {}
    first, errors = {}, {}

    def step(attend: Attend) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(attend(q, k, v), (q, k, v), grad)
            wait(device)

        return run

    with_flex = device.type == "cuda" and cells == max(MEMORY.values())  # it takes seconds to compile
    for label, attend in candidates(mask, dtype, with_flex).items():
        start = time.perf_counter()
        try:
            step(attend)()
        except RuntimeError as error:  # this kernel does not take this call here
            print(f"- {label}: {str(error).strip().splitlines()[0][:120]}")
            continue
        first[label] = 1e3 * (time.perf_counter() - start)
        with torch.no_grad():
            difference = attend(q, k, v).double() - exact
        errors[label] = float(difference.norm() / exact.norm())
        passes[label] = step(attend)
    times = interleave(passes, given.repetitions)
    print("\n| | median ms | minimum ms | first call ms | relative error |\n|---|---|---|---|---|")
    for label, own in times.items():
        row = f"{statistics.median(own):.3f} | {min(own):.3f} | {first[label]:.0f}"
        error = "" if label == "no mask" else f"{errors[label]:.1e}"
        print(f"| {label} | {row} | {error} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the benchmark itself")
    given = parser.parse_args()
    print(machine(given.device))
    if given.tiny:
        given.images = 1
        print_rows("cross-attention", given, 20, 64)
        return
    for queries in (100, 200):
        for name, cells in MEMORY.items():
            print_rows(f"cross-attention, {name}", given, queries, cells)
    print_rows("self-attention", given, 200, 200)


if __name__ == "__main__":
    main()
