"""The contenders of `train_step.py` and `inference.py`: our models and transformers' Mask2Former.

All have random weights, a ResNet-50, 100 queries and 80 classes. Each repetition runs every contender once,
in rotating order, so that other load on the machine affects all equally.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import mpformer.model.backbone  # noqa: F401  lets torchvision, which transformers imports, load with any build of torch
from mpformer.config import Config
from mpformer.model.architecture import build_model
from mpformer.ops import kernel_status
from mpformer.train.timing import Timers
from mpformer.types import PIXEL_MEAN, PIXEL_STD, Batch, Target

CLASSES = 80
TRANSFORMERS = "transformers"


def our_config(settings: dict[str, Any], tiny: bool = False) -> Config:
    """The papers' R50 settings overridden by `model` sections and `train`; `tiny`: for tests."""
    base: dict[str, dict[str, Any]] = {"backbone": {"pretrained": None}}
    if tiny:
        base |= {
            "backbone": {"name": "resnet18", "pretrained": None},
            "pixel_decoder": {"channels": 64, "layers": 1, "ffn": 64},
            "decoder": {"queries": 12, "ffn": 64},
            "loss": {"points": 112},
        }
    train = settings.get("train", {})
    for section in settings.keys() - {"train"}:
        base[section] = {**base.get(section, {}), **settings[section]}
    return Config.model_validate({"model": base, "train": train})


def our_model(config: Config) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config.model, CLASSES)


def their_model(tiny: bool = False) -> nn.Module:
    """transformers' Mask2Former in evaluation mode, like ours: BatchNorm statistics are frozen. It computes
    its losses whenever labels are passed."""
    import transformers

    body = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    sizes: dict[str, Any] = {}
    if tiny:
        body |= {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
        sizes = {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "encoder_layers": 1}
        sizes |= {"encoder_feedforward_dim": 64, "dim_feedforward": 64, "num_queries": 12}
        sizes |= {"train_num_points": 112}
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.ResNetConfig(**body), num_labels=CLASSES, **sizes
    )
    torch.manual_seed(0)
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


def scenes(images: int, objects: int, size: int) -> Batch:
    """Random images with elliptic objects of 1/16 to 1/2 of the image size."""
    random = torch.Generator().manual_seed(objects)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    targets = []
    for _ in range(images):
        draws = torch.rand(objects, 4, generator=random)
        center_y, center_x = draws[:, 0, None, None] * size, draws[:, 1, None, None] * size
        tall, wide = ((1 / 32 + draws[:, i, None, None] * 7 / 32) * size for i in (2, 3))
        masks = ((y - center_y) / tall) ** 2 + ((x - center_x) / wide) ** 2 < 1
        targets.append(Target(torch.randint(0, CLASSES, (objects,), generator=random), masks))
    pixels = torch.randint(0, 256, (images, 3, size, size), generator=random, dtype=torch.uint8)
    names = tuple(map(str, range(images)))
    return Batch(pixels, tuple(targets), ((size, size),) * images, names, tuple(range(images)))


def normalized(images: Tensor) -> Tensor:
    """The normalised float images that transformers expects."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (images - mean) / std


class Stopwatch:
    """Seconds per named part of a pass, measured by hooks on modules and their output tensors.

    A part's backward starts when the first gradient of its outputs is complete and ends when the next part's
    starts: autograd runs the parts one after the other in reverse order.
    """

    waits = False
    """Whether each reading of the clock waits for the GPU's work: else that of a part is seen in a later one.
    The parts then add up to more than a pass that does not wait."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        self.forward: dict[str, float] = {}
        self._marks: dict[str, float] = {}
        self._order = list(parts)
        for name, module in parts.items():
            module.register_forward_pre_hook(lambda *_, name=name: self._start(name))
            module.register_forward_hook(lambda _, __, output, name=name: self._stop(name, output))

    def now(self) -> float:
        """The clock's seconds."""
        if self.waits:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _start(self, name: str) -> None:
        self.forward[name] = self.forward.get(name, 0.0) - self.now()

    def _stop(self, name: str, output: Any) -> None:
        self.forward[name] += self.now()
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda _, name=name: self._mark(name))

    def _mark(self, name: str) -> None:
        if name not in self._marks:
            self._marks[name] = self.now()

    def take(self, end: float) -> dict[str, float]:
        """Seconds per part and direction since the last call; `end`: time at which the backward ended."""
        seconds = {f"{name}, forward": s for name, s in self.forward.items()}
        ends = end
        for name in self._order:
            if name in self._marks:
                seconds[f"{name}, backward"] = ends - self._marks[name]
                ends = self._marks[name]
        self.forward, self._marks, self.first_mark = {}, {}, ends
        return seconds


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """While the body runs, all stopwatches wait for the GPU."""
    Stopwatch.waits = True
    try:
        yield
    finally:
        Stopwatch.waits = False


class StepTimers(Timers):
    """The timers of a training step, which wait for the GPU when stopwatches do."""

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self._watch = watch

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._watch.now()
        with super().__call__(name):
            yield
            self._watch.now()


def tensors_in(value: Any) -> Iterable[Tensor]:
    """The tensors in nested tuples, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors_in(vars(value))


def interleave(passes: dict[str, Callable[[], None]], repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of every repetition, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    for repetition in range(repetitions + 1):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            passes[name]()
            if repetition:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def print_times(times: dict[str, list[float]], references: dict[str, str]) -> None:
    """One line per contender: median, minimum, and speed relative to its reference.

    A ratio above 1 means faster than the reference.
    """
    print(
        "\n| | median ms | minimum ms | reference | ratio of medians | of minima |\n|---|---|---|---|---|---|"
    )
    for name, own in times.items():
        row = f"| {name} | {statistics.median(own):.0f} | {min(own):.0f} |"
        other = references.get(name)
        if other in times:
            medians = statistics.median(times[other]) / statistics.median(own)
            row += f" {other} | {medians:.2f} | {min(times[other]) / min(own):.2f} |"
        else:
            row += " | | |"
        print(row, flush=True)


def print_parts(parts: dict[str, list[dict[str, float]]]) -> None:
    """Median milliseconds of the parts of each contender."""
    rows = list(dict.fromkeys(row for taken in parts.values() for one in taken for row in one))
    print(f"\n| median ms | {' | '.join(parts)} |\n|---{'|---' * len(parts)}|")
    for row in rows:
        cells = []
        for taken in parts.values():
            values = [1e3 * one[row] for one in taken if row in one]
            cells.append(f"{statistics.median(values):.0f}" if values else "")
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


def peak_memory(script: str, contender: str, arguments: argparse.Namespace, objects: int) -> float:
    """Peak resident MB of a new process that runs three passes of one contender."""
    flags = [f"--size={arguments.size}", f"--images={arguments.images}", f"--objects={objects}"]
    flags += [f"--device={arguments.device}", f"--precision={arguments.precision}"]
    flags += ["--tiny"] if arguments.tiny else []
    flags += ["--keep-memory"] if arguments.keep_memory else []
    return printed_by(script, [*flags, f"--memory-of={contender}"])


def printed_by(script: str, flags: list[str]) -> float:
    """The number that a new process running a script prints last."""
    command = [sys.executable, script, *flags]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def fitting(passes: dict[str, Callable[[], object]], device: torch.device) -> dict[str, int]:
    """Bytes that a pass takes at most on a GPU, above what all contenders hold, of those that run and fit; of
    the others the reason is printed. On a CPU nothing is tried: all are 0."""
    if device.type != "cuda":
        return dict.fromkeys(passes, 0)
    fit = {}
    for name, run in passes.items():
        try:
            run()  # the first one makes the optimiser's state and compiles
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            run()
            torch.cuda.synchronize(device)
        except RuntimeError as error:  # out of memory is one, too: the others have their turn
            print(f"- {name} is left out: {str(error).splitlines()[0][:160]}", flush=True)
        else:
            fit[name] = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.empty_cache()
    return fit


def print_memory(used: dict[str, float]) -> None:
    print("\n| | peak MB | of transformers' |\n|---|---|---|")
    for name, megabytes in used.items():
        share = f"{megabytes / used[TRANSFORMERS]:.2f}" if TRANSFORMERS in used else ""
        print(f"| {name} | {megabytes:.0f} | {share} |", flush=True)


def own_peak(device: str) -> float:
    """Peak MB of this process: resident, or on a GPU allocated by torch."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def machine(device: str, keeps_memory: bool = False) -> str:
    """GPU, processor, versions, threads and load, in one paragraph."""
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "?")
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "timm", "numpy"))
    kernel = next(s for s in kernel_status() if s.device == device)
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return (
        f"{date.today()}, {gpu}{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {packages}; {torch.get_num_threads()} threads, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'not set')}; load {os.getloadavg()[0]:.1f}; "
        f"deformable attention: {kernel.kernel}" + ("; freed memory kept" if keeps_memory else "")
    )


def arguments(description: str) -> argparse.ArgumentParser:
    """The options of both benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", type=int, default=512, help="height and width of the images")
    parser.add_argument("--images", type=int, default=1, help="images of a pass")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of the forward"
    )
    parser.add_argument(
        "--keep-memory", action="store_true", help="for all contenders, as our workers on CPUs do"
    )
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--only", default="", help="contenders, comma-separated; all if empty")
    parser.add_argument("--no-memory", action="store_true", help="leave out what measures memory")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the benchmark itself")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser
