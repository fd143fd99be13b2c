"""Device time of a pass by kind of kernel, and its arithmetic rate compared with the device's."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

GROUPS = {
    "deformable attention": r"deform_attn",
    "attention": r"flash|fmha|scaled_dot_product|attention",
    "products, convolutions": r"conv|cudnn|gemm|gemv|cutlass|nvjet|xmma|wgrad|dgrad|addmm|\bmm\b|bmm",
    "sampling at points": r"grid_sample|grid_sampler|mask_point",
    "selection and sorting": r"topk|sort|radix|scan|searchsorted|gather|scatter|index",
    "norms and softmax": r"norm|softmax|welford",
    "optimiser and clipping": r"multi_tensor|adam|foreach|lpnorm",
    "random numbers": r"random|distribution|philox|randint|rand",
    "copies and fills": r"memcpy|memset|copy|fill|cat",
    "element by element": r"elementwise|vectorized|aten::",
}
"""The group of a kernel: the first whose pattern matches its name."""


def wait(device: torch.device) -> None:
    """Wait until queued GPU work finishes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_times(run: Callable[[], object], device: torch.device) -> dict[str, tuple[float, int]]:
    """Milliseconds and launches of each kernel of one pass; on a CPU, of each operator."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as record:
        run()
        wait(device)
    found: dict[str, tuple[float, int]] = {}
    for event in record.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            found[event.key] = (microseconds / 1e3, event.count)
    return found


def write_trace(run: Callable[[], object], device: torch.device, path: str) -> None:
    """Write a Chrome trace of one pass, after one that is not recorded."""
    run()
    wait(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as record:
        run()
        wait(device)
    record.export_chrome_trace(path)


def print_kernels(name: str, times: dict[str, tuple[float, int]], step_ms: float, longest: int = 12) -> None:
    """Print the share of each group and of the longest kernels; step_ms: a pass without the profiler."""
    total = sum(ms for ms, _ in times.values())
    launches = sum(count for _, count in times.values())
    print(
        f"\n{name}: {total:.1f} ms in {launches} kernels, {100 * total / step_ms:.0f} % of {step_ms:.1f} ms"
    )
    shares = dict.fromkeys([*GROUPS, "other"], (0.0, 0))
    for kernel, (ms, count) in times.items():
        group = next((g for g, p in GROUPS.items() if re.search(p, kernel, re.IGNORECASE)), "other")
        shares[group] = (shares[group][0] + ms, shares[group][1] + count)
    print("\n| | ms | share | launches |\n|---|---|---|---|")
    ordered = sorted(times.items(), key=lambda item: -item[1][0])[:longest]
    for label, (ms, count) in [*shares.items(), *((f"`{k[:70]}`", v) for k, v in ordered)]:
        print(f"| {label} | {ms:.2f} | {100 * ms / total:.1f} % | {count} |")


def flops(run: Callable[[], object]) -> float:
    """FLOPs of products, convolutions and attention in one pass, without deformable attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, median of ten: a practical limit of the device."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(seconds[3:])[5]
