"""Device, precision, memory layout, compilation and random seeds."""
import contextlib
import ctypes
import os
import platform
import random
import re
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
import torch.nn.functional as F
from torch import Tensor, nn

from .console import Failure, Stopped, StopSignals, UsageError

SIZES = (64, 128, 256, 512)  # of evaluation batches on a GPU

# Messages of out-of-memory errors without an exception class: of PyTorch's CPU allocator, the CUDA driver, NCCL, cuDNN
# and cuBLAS.
OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory|_ALLOC(ATION)?_FAILED")
NO_ROOM = ("close other programs that use the device's memory (nvidia-smi lists those of a GPU), or use another "
           "--device")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def seed_everything(*key: int) -> None:
    """Seed all random number generators from `key` (integers, 0 or more).

    Every training step and every restart of an evaluation is seeded. So a resumed run draws the same numbers as an
    uninterrupted one, without saved random states. NumPy pads short keys with zeros: (5,) equals (5, 0, 0, 0). So
    each purpose needs a different first number.
    """
    state = np.random.SeedSequence(key).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(state[0])
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))


def choose_device(args) -> torch.device:
    """Return the device named by --device. Raises UsageError if it is not available."""
    name = args.device
    count = 0 if name == "cpu" else cuda_devices()  # --device cpu avoids the warning of an outdated driver
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
        raise UsageError(f"--device {name} is the same for all processes: under torchrun, use --device cuda")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= count:
        raise UsageError(f"--device {name} is not available: cuda:{index} is needed, and the number of usable CUDA "
                         f"devices is {count}; use --device cpu")
    torch.cuda.set_device(index)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow
    return torch.device("cuda", index)


@contextlib.contextmanager
def kernel_search(wanted: bool) -> Iterator[None]:
    """Context in which cuDNN times its kernels for every new size of a convolution and keeps the fastest.

    The search is worth its time in training, where one batch size recurs in every step.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def cuda_devices() -> int:
    """Return the number of usable GPUs: 0 if the driver is missing or too old for this version of PyTorch."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0  # device_count() does not test the driver


def hardware(device: torch.device) -> str:
    """Return the name of the GPU, or the CPU with the instruction set used by PyTorch, which affects rounding."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = about.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in about:  # in a virtual machine, the model name may be generic
        name += f" (family {about['cpu family']}, model {about['model']})"
    amx = ", AMX" if "amx_tile" in about.get("flags", "").split() else ""
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{amx}"


def commit() -> str | None:
    """Return the commit of this code, with "-dirty" after uncommitted changes; None outside a git repository."""
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], text=True, cwd=Path(__file__).resolve().parent, capture_output=True)
        return done.stdout.strip()

    try:
        tracked = git("ls-files", "--", Path(__file__).name)  # an installed copy may be inside another repository
        return (tracked and git("describe", "--always", "--dirty", "--abbrev=40")) or None
    except OSError:  # git is not installed
        return None


def describe(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Return versions, hardware, commit, command line and working directory, to be recorded with every result."""
    return {"commit": commit(), "python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": version("torchvision"), "device": hardware(device), "threads": torch.get_num_threads(),
            "processes": processes, "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "folder": os.getcwd()}


def keep_freed_memory(keep: bool = True) -> None:
    """Make glibc keep freed memory for reuse, or restore its defaults. With another C library, do nothing.

    By default, glibc returns the large blocks of activations to the kernel, which zeroes their pages again for every
    layer. On a CPU, this took about a tenth of a training step (base width 16; measured once, without a log).
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0 if keep else 65536)      # M_MMAP_MAX: number of blocks in mappings of their own
        libc.mallopt(-1, -1 if keep else 64 << 20)  # M_TRIM_THRESHOLD: free bytes that shrink the heap (-1: never)
        if not keep:  # the defaults, with the thresholds that glibc would have adapted to
            libc.mallopt(-3, 32 << 20)              # M_MMAP_THRESHOLD
            libc.malloc_trim(0)


def memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Return the fastest correct memory layout for convolutions: channels_last unless a oneDNN bug affects the model.

    On CPUs, oneDNN makes memory errors in the weight gradient of strided 1x1 convolutions with fewer than 16 input
    channels in channels_last (uxlfoundation/oneDNN issue 6035).
    """
    faulty = any(isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride != (1, 1) and
                 layer.in_channels < 16 for layer in model.modules())
    return torch.contiguous_format if device.type == "cpu" and faulty else torch.channels_last


class Wrapped(nn.Module):
    """Base class of wrappers with another `forward` for `model`.

    The list of parameters is cached: attacks freeze the parameters in every attack step, and walking through all
    modules takes longer than freezing.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.listed = model, list(model.parameters())

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self.listed)


class Compiled(Wrapped):
    """`model`, compiled for training batches whose size is a multiple of `batch_size`. Other batches run uncompiled.

    So the short last batch of an epoch and evaluation batches need no other graphs, and a resumed run takes the same
    code path as an uninterrupted one.
    """

    def __init__(self, model: nn.Module, batch_size: int, mode: str):
        super().__init__(model)
        torch._dynamo.config.recompile_limit = 64  # one graph each for attack and training step, at each size
        self.batch_size, self.overwritten = batch_size, mode != "default"
        self.compiled = torch.compile(model.forward, mode=mode, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.model.training and len(x) % self.batch_size == 0  # MultiGrad's parallel batches are multiples
        if not whole:
            return self.model(x)
        logits = self.compiled(x)
        return logits.clone() if self.overwritten else logits  # CUDA graphs reuse their output memory


class Padded(Wrapped):
    """`model` in eval mode, with every batch padded with black images to the next of `sizes`.

    cuDNN prepares kernels for every new batch size, and evaluation batches have all sizes.
    """

    def __init__(self, model: nn.Module, batch_size: int):
        super().__init__(model)
        self.sizes = [*(size for size in SIZES if size < batch_size), batch_size]

    def forward(self, x: Tensor) -> Tensor:
        missing = next(size for size in self.sizes if size >= len(x)) - len(x)
        return self.model(F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)))[:len(x)]


def padded(model: nn.Module, batch_size: int, device: torch.device) -> nn.Module:
    """Return `model` for batches of up to `batch_size` images, `Padded` on CUDA. On a CPU, padding would cost time and
    change the last bits."""
    return Padded(model, batch_size) if device.type == "cuda" else model


class Precision:
    """Precision of attacks and training steps, and float32 forward passes for measuring accuracy."""

    def __init__(self, args, device: torch.device):
        self.device = device
        self.dtype = DTYPES[args.amp_dtype] if args.amp else torch.float32
        self.apex = _apex(self.dtype, device) if args.amp and args.amp_impl == "apex" else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16 and not self.apex)
        self.tf32 = args.tf32 and device.type == "cuda"
        if not args.tf32:
            torch.backends.cudnn.allow_tf32 = False

    @classmethod
    def float32(cls, device: torch.device) -> "Precision":
        """Return float32 precision. On CUDA, attacks may use TF32."""
        return cls(SimpleNamespace(amp=False, tf32=True), device)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.apex:
            self.apex.initialize(model, optimizer, opt_level="O1", verbosity=0)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return a context in which forward passes use the run's precision."""
        native = self.dtype is not torch.float32 and not self.apex
        return torch.autocast(self.device.type, self.dtype, enabled=native)

    def float32_logits(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return the logits of a float32 forward pass without gradients or TF32, as used for all accuracies."""
        with torch.no_grad(), self.full():
            return model(x).float()

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Context of float32 without TF32."""
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            with self.apex.disable_casts() if self.apex else torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            torch.backends.cudnn.allow_tf32 = before

    @property
    def is_float32(self) -> bool:
        return self.dtype is torch.float32 and not self.tf32

    @property
    def name(self) -> str:
        """float32, tf32, bfloat16 or float16."""
        return "tf32" if self.tf32 and self.dtype is torch.float32 else str(self.dtype).removeprefix("torch.")

    def backward_and_step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """Backpropagate `loss` and take one optimizer step. Returns whether loss and gradient are finite, a tensor.

        With float16, the loss is scaled. A step whose scaled gradient overflows is skipped and is not an error, so only
        the loss is checked, also with apex.
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

    def loss_scale(self, loss: Tensor) -> Tensor:
        """Return the factor of the loss in the next backward pass, a tensor: 1 except with float16."""
        return self.scaler.scale(torch.ones_like(loss))

    def state_dict(self) -> dict:
        return self.apex.state_dict() if self.apex else self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.apex:
            self.apex.load_state_dict(state)
        elif state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


def peak_memory(name: str, device: torch.device) -> dict[str, int]:
    """Return {name: peak memory of the GPU in bytes since the previous call}; {} for a CPU."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {name: peak}


def evaluation_batch(batch_size: int, model: nn.Module, x: Tensor) -> int:
    """Return the number of images in a process's evaluation batch.

    CPU: min(batch_size, 128). CUDA: the largest of SIZES that is at most 4 * batch_size and whose images fit in half of
    the GPU's total memory; fewer images if no size fits. Free memory is not considered, so that other programs do not
    change results.

    Args:
        batch_size: training batch size.
        x: a few images on the device.
    """
    if x.device.type != "cuda":
        return min(batch_size, 128)
    memory = torch.cuda.get_device_properties(x.device).total_memory
    most = min(4 * batch_size, memory // 2 // bytes_per_image(model, x))
    return max((size for size in SIZES if size <= most), default=max(most, 1))


def bytes_per_image(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass in float32 stores for each image until the gradient is computed."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    stored = {}

    def store(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    training = model.training
    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        logits = model.eval()(x.detach().requires_grad_())
    model.train(training)
    del logits  # kept until here: the memory of a freed storage could be reused, and the two be counted as one
    return max(1, sum(size for storage, size in stored.items() if storage not in own) // len(x))


def too_many_at_once(batch_size: int, device: torch.device) -> str:
    """Return advice for an evaluation that runs out of memory."""
    bound = batch_size // 4 if device.type == "cuda" else batch_size
    return f"the evaluation batch has {batch_size} images: lower --batch-size below {max(bound, 2)}"


@contextlib.contextmanager
def advice_on_failure(signals: StopSignals, advice: str) -> Iterator[None]:
    """Context that raises Failure with one line of advice if memory runs out or compilation fails."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or OUT_OF_MEMORY.search(str(error)):
            raise Failure(f"out of memory: {advice}") from None
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            if signals.received:  # the compiler's subprocesses received the signal, too
                raise Stopped(signals.received, " while compiling; --resume auto continues from the newest state",
                              midway=True) from None
            raise Failure(f"--compile: {str(error).partition(chr(10))[0]}; use --no-compile") from None
        raise


def precision_hints(args, device: torch.device) -> list[str]:
    """Return lines to print if the lower precision of --amp is slow on this device."""
    if not args.amp:
        return []
    if device.type == "cuda":
        emulated = args.amp_dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False)
        return ["this GPU emulates bfloat16, which is slow: use --amp-dtype=float16"] if emulated else []
    slower = slowdown(DTYPES[args.amp_dtype])
    return [f"{args.amp_dtype} is {slower:.1f} times as slow as float32 on this processor: do not use --amp"] \
        if slower > 1.2 else []


def slowdown(dtype: torch.dtype) -> float:
    """Measure how many times longer a convolution and its gradients take in `dtype` than in float32 on this CPU."""
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
        raise UsageError("--amp-impl apex needs NVIDIA apex from before 2025-05-08 (later versions have no apex.amp), "
                         "which is not installed: use --amp-impl native") from None
    if dtype is not torch.float16 or device.type != "cuda":
        raise UsageError("--amp-impl apex needs --amp-dtype float16 and a CUDA --device, or use --amp-impl native")
    return amp
