"""Benchmark of multi-scale deformable attention: ours, plain grid_sample, transformers', deformops.

    OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2 python benchmarks/deform_attn.py [--device cuda]

All implementations of a row run in one process: each repetition runs every one once, in rotating order, so
that other load on the machine affects all equally. Prints medians and minima in milliseconds and the ratios
of both to ours. Memory is the peak of one pass above its inputs, each measured in a separate process.
"""

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.ops import kernel_status, ms_deform_attn, ms_deform_attn_fused

HEADS, POINTS = 8, 4


@dataclass(frozen=True)
class Row:
    """A problem size: the pixel decoder's levels (strides 32, 16, 8) for an image, all cells as queries."""

    name: str
    height: int
    width: int
    batch: int = 1
    channels: int = 32
    spread: bool = False  # sampling anywhere in the map instead of near the query

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the levels of the padded image."""
        return tuple((-(-self.height // s), -(-self.width // s)) for s in (32, 16, 8))

    @property
    def queries(self) -> int:
        """Queries per image, and rows of value."""
        return sum(h * w for h, w in self.shapes)


ROWS = [
    Row("512x512", 512, 512),
    Row("512x512, batch 4", 512, 512, batch=4),
    Row("800x1333", 800, 1333),
    Row("1024x1024", 1024, 1024),
    Row("1024x1024, head size 24", 1024, 1024, channels=24),
    Row("1024x1024, sampling anywhere", 1024, 1024, spread=True),
]
TRAINING = Row("1024x1024, batch 16", 1024, 1024, batch=16)
"""On a GPU too: a smaller problem does not fill it."""
TINY = Row("64x64", 64, 64)


def make(row: Row, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs as in training: offsets in a direction per head, 1 to 4 cells far, with a spread of one cell."""
    torch.manual_seed(0)
    levels, queries = len(row.shapes), row.queries
    centres = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
        for h, w in row.shapes
    ]
    reference = torch.cat(centres)[None, :, None].expand(1, queries, levels, 2).contiguous()
    angle = torch.arange(HEADS) * (2 * torch.pi / HEADS)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    offsets = direction[:, None, None] * torch.arange(1.0, POINTS + 1)[:, None]
    offsets = offsets + torch.randn(row.batch, queries, HEADS, levels, POINTS, 2)
    size = torch.tensor([(w, h) for h, w in row.shapes], dtype=torch.float32)[:, None]
    if row.spread:
        anywhere = torch.rand(row.batch, queries, HEADS, levels, POINTS, 2)
        offsets = (anywhere - reference[:, :, None, :, None]) * size
    logits = torch.randn(row.batch, queries, HEADS, levels, POINTS)
    tensors = {
        "value": torch.randn(row.batch, queries, HEADS, row.channels),
        "offsets": offsets,
        "logits": logits,
        "locations": reference[:, :, None, :, None] + offsets / size,
        "weights": logits.flatten(-2).softmax(-1).view(logits.shape),
        "grad": torch.randn(row.batch, queries, HEADS * row.channels),
    }
    half = {"value", "grad", "offsets", "logits"} if dtype != torch.float32 else set()
    tensors = {k: t.to(device, dtype if k in half else None).contiguous() for k, t in tensors.items()}
    return {**tensors, "reference": reference.to(device), "size": size.to(device)}


# ---- the implementations: (inputs, shapes) -> output; "fused" ones take offsets and logits


def grid_sample(value: Tensor, shapes: tuple, locations: Tensor, weights: Tensor) -> Tensor:
    """The plain PyTorch form: one grid_sample per level, everything stacked, one weighted sum."""
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    grids = (2 * locations - 1).to(value.dtype)
    sampled = []
    for level, part in enumerate(value.split([h * w for h, w in shapes], 1)):
        maps = part.flatten(2).transpose(1, 2).reshape(batch * heads, channels, *shapes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False))
    per_head = (
        weights.to(value.dtype).transpose(1, 2).reshape(batch * heads, 1, queries, len(shapes) * points)
    )
    out = (torch.stack(sampled, -2).flatten(-2) * per_head).sum(-1)
    return out.view(batch, heads * channels, queries).transpose(1, 2)


def transformers_operator() -> Callable[..., Tensor]:
    """Hugging Face's function. A CUDA torchvision with a CPU torch needs two operator names defined first."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

    return lambda value, shapes, locations, weights: multi_scale_deformable_attention(
        value, list(shapes), locations.to(value.dtype), weights.to(value.dtype)
    )


def implementations(device: str, fused: bool) -> dict[str, Callable[..., Tensor]]:
    """Name and function of (inputs, shapes, ...) of each installed implementation."""
    found = {"ours": ms_deform_attn, "grid_sample": grid_sample, "transformers": transformers_operator()}
    if device == "cuda":
        try:
            import deformops
        except ImportError:
            print("deformops is not installed: left out")
        else:
            found["deformops"] = deformops.ms_deform_attn

    def plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, shapes: function(x["value"], shapes, x["locations"], x["weights"])

    def from_logits(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: dict[str, Tensor], shapes: tuple) -> Tensor:
            locations = x["reference"][:, :, None, :, None] + x["offsets"] / x["size"]
            weights = x["logits"].flatten(-2).softmax(-1).view(x["logits"].shape)
            return function(x["value"], shapes, locations, weights)

        return run

    if not fused:
        return {name: plain(function) for name, function in found.items()}
    chained = {name: from_logits(function) for name, function in found.items() if name != "ours"}

    def ours(x: dict[str, Tensor], shapes: tuple) -> Tensor:
        return ms_deform_attn_fused(x["value"], shapes, x["reference"], x["offsets"], x["logits"])

    return {"ours": ours, **chained}


def leaves_of(inputs: dict[str, Tensor], fused: bool) -> dict[str, Tensor]:
    names = ("value", "offsets", "logits") if fused else ("value", "locations", "weights")
    return {**inputs, **{name: inputs[name].detach().requires_grad_() for name in names}}


def step(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], row: Row, fused: bool, backward: bool
) -> Callable[[], None]:
    """One measured pass."""

    def run() -> None:
        if not backward:
            with torch.no_grad():
                function(inputs, row.shapes)
            return
        function(leaves_of(inputs, fused), row.shapes).backward(inputs["grad"])

    return run


def interleave(steps: dict[str, Callable[[], None]], repetitions: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of every repetition, after two warm-ups."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for repetition in range(repetitions + 2):
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            steps[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if repetition >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def table(times: dict[str, list[float]]) -> Iterator[str]:
    """One cell per implementation: median [minimum], and the ratios of both to ours."""
    ours = times["ours"]
    for name, own in times.items():
        cell = f"{statistics.median(own):.1f} [{min(own):.1f}]"
        if name != "ours":
            ratio = statistics.median(own) / statistics.median(ours)
            cell += f" = {ratio:.1f}x [{min(own) / min(ours):.1f}x]"
        yield cell


# ---- memory


def peak_memory(name: str, row: Row, fused: bool, backward: bool, device: str, dtype: torch.dtype) -> float:
    """Peak MB above the inputs of one pass in this process, after a pass on a tiny problem."""
    function = implementations(device, fused)[name]
    small = Row("", 64, 64, channels=row.channels)
    step(function, make(small, device, dtype), small, fused, True)()
    inputs = make(row, device, dtype)
    run = step(function, inputs, row, fused, backward)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the peak

    def resident(field: str) -> float:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024 / 1e6

    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def memory_in_process(
    name: str, row: int, fused: bool, backward: bool, arguments: argparse.Namespace
) -> float:
    flags = [f"--device={arguments.device}", f"--dtype={arguments.dtype}"]
    job = f"--memory={name},{row},{int(fused)},{int(backward)}"
    command = [sys.executable, __file__, *flags, job]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


# ---- lower bounds


def floor(row: Row, dtype: torch.dtype, device: str, milliseconds: float | None) -> str:
    """Bytes and operations of the forward pass, and the rates that this machine reaches otherwise.

    milliseconds: of our pass, to be compared with them.
    """
    element = torch.empty((), dtype=dtype).element_size()
    rows = row.batch * row.queries * HEADS
    moved = rows * (2 * row.channels * element + len(row.shapes) * POINTS * 3 * element)
    corners = rows * len(row.shapes) * POINTS * 4
    gathered, operations = corners * row.channels * element, 2 * corners * row.channels
    rates = {name: measure_rate(size, device) for name, size in (("memory", 2**28), ("cache", 2**20))}
    reached = ""
    if milliseconds is not None:
        seconds = milliseconds / 1e3
        reached = (
            f"; ours {milliseconds:.2f} ms: {moved / seconds / 1e9:.0f} GB/s of the compulsory bytes "
            f"({100 * moved / seconds / rates['memory']:.0f} % of the rate from memory), "
            f"{gathered / seconds / 1e9:.0f} GB/s of corners"
        )
    return (
        f"compulsory {moved / 1e6:.0f} MB: {1e3 * moved / rates['memory']:.1f} ms at the measured "
        f"{rates['memory'] / 1e9:.0f} GB/s from memory; corners {gathered / 1e6:.0f} MB: "
        f"{1e3 * gathered / rates['cache']:.1f} ms at the measured {rates['cache'] / 1e9:.0f} GB/s from "
        f"cache; {operations / 1e9:.2f} G operations{reached}"
    )


def measure_rate(size: int, device: str) -> float:
    """Bytes read per second by repeated sums over `size` bytes per thread; best of 30."""
    count = torch.get_num_threads() if device == "cpu" else 1
    again = max(1, 2**26 // size)
    data = torch.ones(count, 1, size // 4, device=device).expand(-1, again, -1)
    best = float("inf")
    for _ in range(30):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        data.sum(-1)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return count * again * size / best


# ---- the whole pixel decoder


def pixel_decoder(repetitions: int, device: str) -> None:
    """The R50 recipe's pixel decoder at 512 x 512 with each operator."""
    from mpformer.config.model import PixelDecoder
    from mpformer.model import pixel_decoder as module

    torch.manual_seed(0)
    widths = (256, 512, 1024, 2048)
    decoder = module.DeformablePixelDecoder(PixelDecoder(), widths).to(device)
    features = [torch.randn(1, c, 128 >> i, 128 >> i, device=device) for i, c in enumerate(widths)]
    steps: dict[bool, dict[str, Callable[[], None]]] = {False: {}, True: {}}
    for name, function in implementations(device, fused=True).items():

        def attend(value, shapes, reference, offsets, logits, function=function):
            size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32, device=value.device)[
                :, None
            ]
            given = {
                "value": value,
                "reference": reference,
                "offsets": offsets,
                "logits": logits,
                "size": size,
            }
            return function(given, shapes)

        def run(backward: bool, attend=attend) -> None:
            module.ms_deform_attn_fused = attend
            with torch.set_grad_enabled(backward):
                masks, memories = decoder(tuple(features))
            if backward:
                (masks.mean() + sum(m.mean() for m in memories)).backward()

        for backward in (False, True):
            steps[backward][name] = lambda backward=backward, run=run: run(backward)
    print("\nWhole pixel decoder, 512x512, batch 1, float32 (ms, median [min])\n")
    print("| pass | " + " | ".join(steps[False]) + " |")
    print("|---" * (len(steps[False]) + 1) + "|")
    for backward, label in ((False, "forward"), (True, "forward + backward")):
        cells = table(interleave(steps[backward], repetitions, device))
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def machine(device: str) -> str:
    """Processor, versions, threads and load, in one paragraph."""
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "?")
    kernel = {s.device: s for s in kernel_status()}[device]
    packages = []
    for package in ("torch", "transformers", "deformops"):
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            packages.append(f"{package} not installed")
    name = torch.cuda.get_device_name() if device == "cuda" else model
    return (
        f"{date.today()}, {name}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {', '.join(packages)}; {torch.get_num_threads()} threads, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'not set')}; load {os.getloadavg()[0]:.1f}; "
        f"our kernel: {kernel.kernel} ({kernel.reason.split(':')[0]})"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--forms", default="plain,fused", help="plain (from locations), fused (from logits)")
    parser.add_argument("--parts", default="time,memory,bound,decoder", help="what to print")
    parser.add_argument("--tiny", action="store_true", help="one small shape, to try the benchmark itself")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if arguments.memory:
        name, row, fused, backward = arguments.memory.split(",")
        flags = int(fused) == 1, int(backward) == 1
        print(peak_memory(name, ROWS[int(row)], *flags, arguments.device, dtype))
        return

    print(machine(arguments.device))
    rows = [(i, row) for i, row in enumerate(ROWS) if arguments.rows in row.name]
    parts = arguments.parts.split(",")
    if arguments.device == "cuda" and arguments.rows in TRAINING.name:
        rows.append((len(ROWS), TRAINING))
    if arguments.tiny:
        rows, parts = [(len(ROWS), TINY)], ["time", "bound"]
    forward_ms: dict[str, float] = {}
    """Of our pass by row, of the form measured last."""
    for fused in (form == "fused" for form in arguments.forms.split(",")):
        form = (
            "from offsets and logits (softmax and locations included)"
            if fused
            else "from locations and weights"
        )
        functions = implementations(arguments.device, fused)
        header = f"\n| shape | pass | {' | '.join(functions)} |\n{'|---' * (len(functions) + 2)}|"
        passes = list(itertools.product(rows, ((False, "forward"), (True, "forward + backward"))))
        if "time" in parts:
            print(f"\n{arguments.dtype}, {form} (ms, median [min])\n{header}")
            for (_, row), (backward, label) in passes:
                inputs = make(row, arguments.device, dtype)
                steps = {name: step(f, inputs, row, fused, backward) for name, f in functions.items()}
                times = interleave(steps, arguments.repetitions, arguments.device)
                print(f"| {row.name} | {label} | " + " | ".join(table(times)) + " |", flush=True)
                if not backward:
                    forward_ms[row.name] = statistics.median(times["ours"])
        if "memory" in parts:
            print(f"\nPeak memory of one pass above its inputs, {form} (MB)\n{header}")
            for (index, row), (backward, label) in (p for p in passes if p[0][1] in ROWS):
                used = {n: memory_in_process(n, index, fused, backward, arguments) for n in functions}
                ratios = {n: "" if n == "ours" else f" = {mb / used['ours']:.1f}x" for n, mb in used.items()}
                cells = [f"{used[n]:.0f}{ratios[n]}" for n in functions]
                print(f"| {row.name} | {label} | " + " | ".join(cells) + " |", flush=True)
    if "bound" in parts:
        print("\nBound of the forward pass\n")
        for _, row in rows:
            print(
                f"- {row.name}: {floor(row, dtype, arguments.device, forward_ms.get(row.name))}", flush=True
            )
    if "decoder" in parts:
        pixel_decoder(arguments.repetitions, arguments.device)


if __name__ == "__main__":
    main()
