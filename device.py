"""The device of a run: which one, and how a network is laid out and compiled there."""
import contextlib
import ctypes
import os
import platform

import torch
from torch import nn

from utils import UsageError


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
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if not local_rank.isdecimal():
        raise UsageError(f"LOCAL_RANK is {local_rank}, but torchrun did not start this process: unset it, or use "
                         f"torchrun")
    index = int(local_rank) if device.index is None else device.index
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


def to_compile(args, device: torch.device) -> bool:
    """Whether the network is to be compiled: as the arguments say or else, on CUDA, where it keeps their promises.

    The compiler chooses kernels by timing them, which is not deterministic, and stops at every SyncBatchNorm; apex
    replaces PyTorch's functions by its own, which were never meant to be compiled.
    """
    if args.compile is None:
        apex = args.amp and args.amp_impl == "apex"
        return device.type == "cuda" and not args.deterministic and not args.sync_bn and not apex
    return args.compile


def compile_network(model: nn.Module, mode: str) -> None:
    """Have `model` compiled as it is trained: a graph for each size of a batch.

    One for all sizes would come into use with the first short batch, and a run that goes on in a new process would take
    another graph than the unbroken one, and other bits.
    """
    torch._dynamo.config.recompile_limit = 64  # train, eval, attack and float32, each with its last short batch
    model.compile(mode=mode, dynamic=False)
