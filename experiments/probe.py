"""Measure this code on a GPU. Every item appends one JSON line to OUT/probe.jsonl as soon as it is done.

    python experiments/probe.py OUT                    # needs a CUDA GPU, no data
    python experiments/probe.py OUT --only=captured    # only items whose name contains this text
    python experiments/probe.py OUT --dummy            # seconds, without a GPU: only to see that everything works

Items: facts of the GPU; ceilings of copies, matrix products and launches; training steps; an epoch's evaluation;
training steps recorded as a CUDA graph; kernels by time; memory by network; at the end tests/test_cuda.py, whose
results also go to OUT/test_cuda.xml. If an item fails, its line has the error. Images and labels are random. A second
call appends lines.
"""
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from definitions import ROOT
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(ROOT))
from singlestep import options, train
from singlestep.data import Images
from singlestep.options import CIFAR10
from singlestep.run.console import StopSignals, UsageError, one_line_errors, say
from singlestep.run.device import cuda_devices, describe, kernel_search, peak_memory, seed_everything
from singlestep.run.distributed import World
from singlestep.run.folder import Folder
from singlestep.run.state import State

STEPS = 8  # training steps in half an epoch; those of the second half differ on the host and are not used
TESTS_SECONDS = 1200  # after which test_cuda.py is interrupted

Item = Callable[[], dict[str, Any]]
Take = Callable[[train.Run, train.Batch], None]


class Scale(NamedTuple):
    """Size of the measurements.

    Attributes:
        flags: flags of train_cifar.py.
        steps: number of training steps to time.
        side, pixels: side of the matrices and of the images.
        entries: entries of the tensor to copy.
        images: number of images to evaluate.
    """

    flags: tuple[str, ...]
    steps: int
    side: int
    pixels: int
    entries: int
    images: int


FULL = Scale(("--batch-size=128",), 20, 8192, 32, 1 << 28, 1000)
DUMMY = Scale(("--batch-size=4", "--base-width=4", "--width-factor=1", "--test-iters=1"), 1, 64, 16, 1 << 16, 8)


class Probe:
    """All items, at one scale on one device."""

    def __init__(self, out: Path, scale: Scale):
        self.out, self.scale = out, scale
        self.device = train.choose_device(options.parse(CIFAR10, argv=[]))
        self.cuda = self.device.type == "cuda"

    def items(self) -> dict[str, Item]:
        compiled = [("--amp", "--compile")] if self.cuda else []
        ways: list[tuple[str, ...]] = [(), ("--amp",)]
        found: dict[str, Item] = {"facts": self.facts, "ceilings": self.ceilings}

        def add(name: str, item: Callable[..., dict[str, Any]], *flags: str) -> None:
            found[" ".join([name, *flags])] = lambda: item(*flags)

        for flags in (*ways, *compiled):
            add("step", self.step, "--method=zerograd", *flags)
        for method in ("multigrad", "pgd"):
            add("step", self.step, f"--method={method}", "--amp")
        for flags in ways:
            add("evaluation", self.evaluation, *flags)
        for flags in (*ways, *compiled):
            add("captured", self.captured, *flags)
        add("kernels", self.kernels, "--amp")
        for model in ("PreActResNet18", "PreActResNet50", "WideResNet"):
            for flags in ways:
                add("memory", self.memory, f"--model={model}", *flags)
        return {**found, "tests": self.tests}

    def facts(self) -> dict[str, Any]:
        """Return versions, hardware and commit."""
        about: dict[str, Any] = {**describe(self.device), "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        if self.cuda:
            gpu = torch.cuda.get_device_properties(self.device)
            about |= {"memory": gpu.total_memory, "processors": gpu.multi_processor_count,
                      "capability": [gpu.major, gpu.minor], "cuda": torch.version.cuda,
                      "cudnn": torch.backends.cudnn.version(),
                      "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False)}
        return about

    def ceilings(self) -> dict[str, float]:
        """Measure a copy (bytes per second), matrix products (operations per second) and a launch (seconds)."""
        a = torch.zeros(self.scale.entries, device=self.device)
        b, one, side = torch.empty_like(a), torch.zeros(1, device=self.device), self.scale.side
        found = {"copy": 8 * len(a) / self.least(lambda: b.copy_(a)),
                 "launch": self.least(lambda: [one.add_(1) for _ in range(1000)]) / 1000}
        tf32 = torch.backends.cuda.matmul.allow_tf32
        for name, dtype in (("float32", torch.float32), ("tf32", torch.float32), ("bfloat16", torch.bfloat16),
                            ("float16", torch.float16)):
            torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
            m = torch.randn(side, side, device=self.device).to(dtype)
            found[f"product {name}"] = 2 * side**3 / self.least(lambda m=m: m @ m)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        return found

    def step(self, *flags: str) -> dict[str, float]:
        """Measure the milliseconds of a training step, with its data."""
        return self.milliseconds(stepper(self.run(*flags)))

    def evaluation(self, *flags: str) -> dict[str, Any]:
        """Measure the seconds of the evaluation after an epoch, first and second call, over epsilon.

        The labels are the network's predictions, so at epsilon 0 all images stay robust and take all attack steps.
        """
        run = self.run(*flags)
        step = stepper(run)
        for _ in range(STEPS):
            step()
        run.state.model.eval()
        x, _ = run.test.batch(slice(None))
        run.test.labels = run.state.precision.float32_logits(run.state.model, x).argmax(dim=1)
        found = []
        for epsilon in (0.0, 0.5, 2.0, 8.0):
            run.args.epsilon, run.args.pgd_alpha = epsilon, epsilon / 4
            first, again = (train.measure(run) for _ in range(2))
            found.append({"epsilon": epsilon, "first": first["test_time"], "again": again["test_time"],
                          "robust": again["test_robust_acc"]})
        return {"epsilons": found, "images": len(run.test), "evaluation_batch": run.evaluation_batch}

    def captured(self, *flags: str) -> dict[str, Any]:
        """Time a ZeroGrad step replayed from a CUDA graph, in milliseconds, and compare its bits with a plain step's.

        In the line, `replayed` has the differences between replayed and plain steps, `again` those between plain steps.
        """
        ends = []
        for replayed in (False, False, True):
            run = self.run("--method=zerograd", "--lr-schedule=cyclic", *flags)
            take = Captured(run) if replayed else rounded
            step = stepper(run, take)
            with beside(self.device):
                for _ in range(3):
                    step()
            if replayed:
                take.record()
            for _ in range(3):
                step()
            ends.append({name: value.clone() for name, value in tensors(run.state).items()})
        plain, again, replayed_end = ends
        return {"graph": self.cuda, "replayed": differences(plain, replayed_end), "again": differences(plain, again),
                **self.milliseconds(step)}

    def kernels(self, *flags: str) -> dict[str, Any]:
        """List the longest kernels of a ZeroGrad step: name, calls, milliseconds. On a CPU: the operations."""
        step, count = stepper(self.run("--method=zerograd", *flags)), self.scale.steps
        for _ in range(min(3, count)):
            step()
        self.wait()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]) as profiler:
            for _ in range(count):
                step()
            self.wait()
        on_device = torch.autograd.DeviceType.CUDA if self.cuda else torch.autograd.DeviceType.CPU
        taken = [(event.key, event.count / count, (event.self_device_time_total if self.cuda else
                                                   event.self_cpu_time_total) / 1000 / count)
                 for event in profiler.key_averages()
                 if event.device_type == on_device and not getattr(event, "is_user_annotation", False)]
        taken.sort(key=lambda kernel: -kernel[2])
        return {"launches": sum(calls for _, calls, _ in taken), "ms": sum(ms for _, _, ms in taken),
                "longest": [[name[:120], calls, ms] for name, calls, ms in taken[:20]]}

    def memory(self, *flags: str) -> dict[str, Any]:
        """Time a ZeroGrad step, in milliseconds; on CUDA, also measure the peak memory of training and evaluation."""
        run = self.run("--method=zerograd", *flags)
        step = stepper(run)
        step()
        ms, training = 1000 * self.seconds(step), peak_memory("training", self.device)
        evaluation = train.measure(run).get("test_memory")
        return {"step": ms, **training, "evaluation": evaluation, "evaluation_batch": run.evaluation_batch}

    def tests(self) -> dict[str, Any]:
        """Run tests/test_cuda.py. Its output goes to OUT/test_cuda.log."""
        report = self.out / "test_cuda.xml"
        report.unlink(missing_ok=True)
        with open(self.out / "test_cuda.log", "wb") as log:
            subprocess.run(["timeout", "--signal=INT", "--kill-after=60", str(TESTS_SECONDS), sys.executable, "-m",
                            "pytest", "-v", "-p", "no:cacheprovider", "tests/test_cuda.py",
                            f"--junit-xml={report.resolve()}"], cwd=ROOT, stdout=log, stderr=log)
        suite = ElementTree.parse(report).getroot()[0]
        return {**{key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")},
                "failed": [case.get("name") for case in suite if {"failure", "error"} & {part.tag for part in case}]}

    def run(self, *flags: str) -> train.Run:
        """Return a new run on random images."""
        args = options.parse(CIFAR10, argv=[*self.scale.flags, "--lr-max=0.01", *flags])
        world, n = World(device=self.device), 2 * STEPS * args.batch_size
        state, layout = train.build(CIFAR10, args, self.device, world)
        generator = torch.Generator().manual_seed(0)
        shape = (n + self.scale.images, self.scale.pixels, self.scale.pixels, 3)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        images = Images(pixels, torch.randint(10, (len(pixels),), generator=generator)).to(self.device, layout)
        return train.assemble(CIFAR10, args, state, Folder(None), world, StopSignals(),
                              [images[:n], images[:0], images[n:]])

    def milliseconds(self, step: Callable[[], None]) -> dict[str, float]:
        """Measure the milliseconds of a step, after a warm-up.

        Returns:
            step: mean of many steps in a row. host: time until an idle device has a step queued. device: time of the
            step's kernels without waits for the host (queued during a pause). On a CPU, all three are equal.
        """
        count = self.scale.steps
        for _ in range(min(3, count)):
            step()
        row = 1000 * self.seconds(lambda: [step() for _ in range(count)]) / count
        if not self.cuda:
            return {"step": row, "host": row, "device": row}
        host, device = [], []
        for _ in range(count):
            self.wait()
            began = time.perf_counter()
            step()
            host.append(1000 * (time.perf_counter() - began))
        for _ in range(count):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.wait()
            torch.cuda._sleep(int(4e6 * statistics.median(host)))  # cycles: twice the host's time, at 2 GHz
            first.record()
            step()
            last.record()
            self.wait()
            device.append(first.elapsed_time(last))
        return {"step": row, "host": statistics.median(host), "device": statistics.median(device)}

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the wall-clock seconds of `work()`, until the device is idle."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def least(self, work: Callable[[], Any]) -> float:
        """Return the least seconds of five calls."""
        return min(self.seconds(work) for _ in range(5))

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Free the memory before the next item."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def stepper(run: train.Run, take: Take = train.train_step) -> Callable[[], None]:
    """Return a function that takes the run's next training step with `take`, repeating half an epoch."""
    state, device, n = run.state, run.train.labels.device, len(run.train)
    seed_everything(train.ORDER, run.args.seed, 0)
    order = torch.randperm(n).to(device)
    drawn = {name: values.to(device) for name, values in run.augmentation.draw(n).items()}
    state.sums, state.first_fault = state.sums.to(device), state.first_fault.to(device)
    state.model.train()

    def step() -> None:
        with kernel_search(True):
            take(run, train.batch(run, order, drawn))
        state.step = (state.step + 1) % STEPS

    return step


def rounded(run: train.Run, batch: train.Batch) -> None:
    """Take a plain training step, with the learning rate rounded to float32 as in a captured step."""
    train.train_step(replace(run, schedule=lambda t: torch.tensor(run.schedule(t)).item()), batch)


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Context on a separate CUDA stream, which the warm-up of a recording needs."""
    if device.type == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class Captured:
    """A training step on batches of one size, recorded as a CUDA graph.

    Before each replay, the inputs of the step (images, learning rate, first fault) are copied into fixed tensors, and
    the generator is seeded.
    """

    def __init__(self, run: train.Run):
        self.rate = torch.zeros((), device=run.train.labels.device)
        self.run = replace(run, schedule=lambda t: self.rate)
        self.batch: train.Batch | None = None
        self.replay: Callable[[], None] = self.step

    def __call__(self, run: train.Run, batch: train.Batch) -> None:
        state, args = run.state, run.args
        self.batch = self.batch or train.Batch(batch.x.clone(), batch.y.clone(), batch.whole.clone(), {}, batch.number)
        for name in ("x", "y", "whole"):
            getattr(self.batch, name).copy_(getattr(batch, name))
        self.rate.fill_(run.schedule(state.epoch + (state.step + 1) / run.steps))
        seed_everything(train.STEP, args.seed, state.epoch, state.step, 0)
        self.replay()

    def step(self) -> None:
        state, fault = self.run.state, self.run.state.first_fault
        train.train_step(self.run, self.batch)
        state.first_fault = fault.copy_(state.first_fault)

    def record(self) -> None:
        """Record the step. Its changes are undone."""
        on_cuda = self.rate.is_cuda
        recorded = torch.cuda.CUDAGraph() if on_cuda else Operations(list(tensors(self.run.state).values()))
        recording = torch.cuda.graph(recorded) if on_cuda else recorded
        with mock.patch.object(train, "seed_everything"), kernel_search(True), recording:
            self.step()
        self.replay = recorded.replay


class Operations(TorchDispatchMode):
    """CPU version of a CUDA graph: record a step's operations, undo their changes, replay them."""

    def __init__(self, changed: list[Tensor]):
        super().__init__()
        self.recorded: list[tuple[Callable, tuple, dict[str, Any], Any]] = []
        self.before = [(tensor, tensor.clone()) for tensor in changed]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.recorded.append((function, args, kwargs or {}, result))
        return result

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for tensor, value in self.before:
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        new: dict[int, Tensor] = {}  # id of a recorded tensor -> the one in its place
        for function, args, kwargs, result in self.recorded:
            args, kwargs = tree_map(lambda value: new.get(id(value), value), (args, kwargs))
            pairs = zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)))
            new.update((id(old), again) for old, again in pairs if isinstance(old, Tensor))


def tensors(state: State) -> dict[str, Tensor]:
    """Return the tensors that a training step changes, by name."""
    momenta = {f"momentum {i}": each["momentum_buffer"] for i, each in enumerate(state.optimizer.state.values())}
    return {**state.model.state_dict(), **momenta, "sums": state.sums, "first fault": state.first_fault}


def differences(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Any]:
    """Compare tensors: how many differ in any bit, of how many, the largest difference, and three names."""
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    largest = max(((left[name].double() - right[name].double()).abs().max().item() for name in differing), default=0.0)
    return {"tensors": len(differing), "of": len(left), "largest": largest, "first": differing[:3]}


def line(name: str, item: Item) -> str:
    """Run the item and return its JSON line; if the item fails, the line has the error."""
    began = time.perf_counter()
    try:
        found = item()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    return json.dumps({"item": name, "seconds": round(time.perf_counter() - began, 3), **found})


def main() -> None:
    p = options.Parser(__doc__)
    p.add_argument("out", metavar="OUT", type=options.path, help="folder of the files")
    p.add_argument("--only", metavar="TEXT", default="", help="only items whose name contains TEXT")
    p.add_argument("--dummy", action="store_true", help="small and short, without a GPU if there is none")
    args = p.parse_args()
    with one_line_errors():
        if not args.dummy and not cuda_devices():
            raise UsageError("the probe needs a CUDA GPU that this PyTorch can use; to try it without one: --dummy")
        Folder(args.out).require_writable("OUT")
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        if args.dummy:
            torch.set_num_threads(1)  # more are slower at this size
        probe = Probe(out, DUMMY if args.dummy else FULL)
        for name, item in probe.items().items():
            if args.only in name:
                probe.free()
                written = line(name, item)
                with open(out / "probe.jsonl", "a") as file:
                    file.write(written + "\n")
                say(written)


if __name__ == "__main__":
    main()
