"""The device of a run, its precision, the network's layout and compiling, and random seeds."""
import contextlib
import ctypes
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .console import Failure, Stopped, StopSignals, UsageError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def seed_everything(*key: int) -> None:
    """Make all random numbers from here on a function of `key` (whole numbers, 0 or more) alone.

    Every training step and every evaluated batch starts with this, so that a run that goes on from any step draws
    what an unbroken run draws, and no random state needs saving. NumPy fills a short key up with zeros: (5,) is the
    same as (5, 0, 0, 0), so that every purpose needs a first number of its own.
    """
    state = np.random.SeedSequence(key).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(state[0])
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))


def choose_device(args) -> torch.device:
    """The device that --device names. Raises UsageError where it is not there."""
    name = args.device
    count = 0 if name == "cpu" else cuda_devices()  # a driver that is too old complains
    if name == "auto":
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, not {name}")
    if device.type == "cpu":
        keep_freed_memory()
        return device
    if device.index is not None and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(f"--device {name} is one for all processes: under torchrun, use --device cuda")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= count:
        raise UsageError(f"--device {name} is not there: cuda:{index} is asked for, and {count} CUDA devices can be "
                         f"used here; take --device cpu")
    torch.cuda.set_device(index)
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return torch.device("cuda", index)


def cuda_devices() -> int:
    """How many GPUs can be used: none where the driver is missing, or too old for this PyTorch."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0  # the count alone asks no driver to start


def hardware(device: torch.device) -> str:
    """The name of the GPU; or that of the processor and the instruction set that PyTorch uses, which decides bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = about.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in about:  # a virtual machine may hide which of the maker's processors it is
        name += f" (family {about['cpu family']}, model {about['model']})"
    amx = ", AMX" if "amx_tile" in about.get("flags", "").split() else ""
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{amx}"


def commit() -> str | None:
    """The commit of this code, with "-dirty" if a file has changed; None where the code is in no git repository."""
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], text=True, cwd=Path(__file__).resolve().parent, capture_output=True)
        return done.stdout.strip()

    try:
        tracked = git("ls-files", "--", Path(__file__).name)  # an installed copy may lie in a repository of the user's
        return (tracked and git("describe", "--always", "--dirty", "--abbrev=40")) or None
    except OSError:  # git is not installed
        return None


def describe(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What a figure has to stand with: versions, hardware and the commit of this code."""
    return {"commit": commit(), "python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": version("torchvision"), "device": hardware(device), "threads": torch.get_num_threads(),
            "processes": processes, "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}


def keep_freed_memory(keep: bool = True) -> None:
    """Have the C library keep freed memory for this process, or no longer; does nothing where that is not glibc.

    By default, glibc gives the large blocks that activations live in back to the kernel, which zeroes their pages anew
    for every layer: a tenth of a training step on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0 if keep else 65536)      # M_MMAP_MAX: how many blocks are mapped apart, and so unmapped
        libc.mallopt(-1, -1 if keep else 64 << 20)  # M_TRIM_THRESHOLD: from where on the heap shrinks (-1: never)
        if not keep:  # these are the defaults, and the thresholds that glibc comes to by itself
            libc.mallopt(-3, 32 << 20)              # M_MMAP_THRESHOLD
            libc.malloc_trim(0)


def memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """The layout in which convolutions are fastest, where it can be trusted.

    On CPUs, oneDNN computes the weight gradient of a strided 1x1 convolution in channels_last with memory errors if it
    has fewer than 16 input channels (uxlfoundation/oneDNN issue 6035).
    """
    faulty = any(isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride != (1, 1) and
                 layer.in_channels < 16 for layer in model.modules())
    return torch.contiguous_format if device.type == "cpu" and faulty else torch.channels_last


class Compiled(nn.Module):
    """`model`, compiled for training on whole batches of `batch_size`; whatever else it is given, it runs as it is.

    So neither the last short batch of an epoch nor an evaluation costs a graph, and a run that goes on takes the same
    path as an unbroken one.
    """

    def __init__(self, model: nn.Module, batch_size: int, mode: str):
        super().__init__()
        torch._dynamo.config.recompile_limit = 64  # the attack and the training step, each at each size
        self.model, self.batch_size, self.overwritten = model, batch_size, mode != "default"
        self.compiled = torch.compile(model.forward, mode=mode, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.model.training and len(x) % self.batch_size == 0  # MultiGrad's parallel batches are multiples
        if not whole:
            return self.model(x)
        logits = self.compiled(x)
        return logits.clone() if self.overwritten else logits  # a CUDA graph answers in the same memory every time


class Precision:
    """The precision of a run's attacks and training steps, and the float32 in which accuracy is judged."""

    def __init__(self, args, device: torch.device):
        self.device = device
        self.dtype = DTYPES[args.amp_dtype] if args.amp else torch.float32
        self.apex = _apex(self.dtype, device) if args.amp and args.amp_impl == "apex" else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16 and not self.apex)
        self.tf32 = args.tf32 and device.type == "cuda"
        if not args.tf32:
            torch.backends.cudnn.allow_tf32 = False

    @classmethod
    def float32(cls, device: torch.device, tf32: bool = True) -> "Precision":
        """Float32, on CUDA with or without TF32 in attacks."""
        return cls(SimpleNamespace(amp=False, tf32=tf32), device)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.apex:
            self.apex.initialize(model, optimizer, opt_level="O1", verbosity=0)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Forward passes in here use the run's precision."""
        native = self.dtype is not torch.float32 and not self.apex
        return torch.autocast(self.device.type, self.dtype, enabled=native)

    def float32_logits(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The logits of a float32 forward pass, such as decides every accuracy."""
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            lowered = self.apex.disable_casts() if self.apex else torch.autocast(self.device.type, enabled=False)
            with torch.no_grad(), lowered:
                return model(x).float()
        finally:
            torch.backends.cudnn.allow_tf32 = before

    @property
    def is_float32(self) -> bool:
        return self.dtype is torch.float32 and not self.tf32

    def backward_and_step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """One step of the optimizer down `loss`. Returns whether loss and gradient were finite, as a tensor.

        With float16 the loss is scaled; a step whose scaled gradient overflows is then skipped and no fault, and so
        apex, which scales too, is asked about the loss only.
        """
        optimizer.zero_grad(set_to_none=True)
        finite = loss.detach().isfinite()
        if self.apex:
            with self.apex.scale_loss(loss, optimizer) as scaled_loss:
                scaled_loss.backward()
            optimizer.step()
            return finite
        self.scaler.scale(loss).backward()
        if not self.scaler.is_enabled():
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            finite &= torch.nn.utils.get_total_norm(gradients).isfinite()
        self.scaler.step(optimizer)
        self.scaler.update()
        return finite

    def state_dict(self) -> dict:
        return self.apex.state_dict() if self.apex else self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.apex:
            self.apex.load_state_dict(state)
        elif state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


def evaluation_batch(args, device: torch.device) -> int:
    """How many images a process evaluates at once, fewer where --batch-size, of all processes, is small.

    For an image, an attack stores as much as a training step: 4 MiB in float32, or 23 with a WideResNet-34-10.
    """
    fuller = device.type == "cuda" and args.model != "WideResNet"
    return min(args.batch_size, 128) * (4 if fuller else 1)


@contextlib.contextmanager
def advised(signals: StopSignals, advice: str) -> Iterator[None]:
    """If memory runs out, or a compiler is missing, end the run with one line of advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no class of its own for a CPU's memory.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise Failure(f"out of memory: {advice}") from None
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            if signals.received:  # which the compiler's own processes received, too
                raise Stopped(signals.received, " while compiling; --resume auto continues from the newest state",
                              midway=True) from None
            raise Failure(f"--compile: {str(error).partition(chr(10))[0]}; use --no-compile") from None
        raise


def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a convolution and its gradients take on this CPU: measured, in a moment."""
    layer = nn.Conv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.zeros(16, 32, 16, 16).to(memory_format=torch.channels_last).requires_grad_()

    def seconds(lowered: bool) -> float:
        began = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=lowered):
            layer(x).float().sum().backward()
        return time.perf_counter() - began

    in_float32, in_dtype = (min(seconds(lowered) for _ in range(3)) for lowered in (False, True))
    return in_dtype / in_float32


def _apex(dtype: torch.dtype, device: torch.device):
    try:
        from apex import amp
    except ImportError:
        raise UsageError("--amp-impl apex needs an NVIDIA apex from before 2025-05-08, which still has apex.amp; "
                         "here there is none: use --amp-impl native") from None
    if dtype is not torch.float16 or device.type != "cuda":
        raise UsageError("--amp-impl apex needs --amp-dtype float16 and a CUDA --device; or use --amp-impl native")
    return amp
