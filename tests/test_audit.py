"""What makes the host wait for a GPU: training steps of every method and steps of the evaluates, on fake CUDA tensors.

Fake tensors have a device and a shape but no data, and need no GPU. An `Audit` sees every operation on them. All audits
are made in one process of its own, which prints what they found: without a GPU, a build of PyTorch for CUDA can
differentiate fake tensors only if it takes itself for one without accelerators, which a small library makes it do.
"""
import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import SmallNet
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from singlestep import attacks, methods, networks, options, robustness, train
from singlestep.data import Images
from singlestep.robustness import PGD, attack_steps
from singlestep.run.console import StopSignals
from singlestep.run.device import Precision
from singlestep.run.distributed import World
from singlestep.run.folder import Folder

CUDA = torch.device("cuda", 0)
PRECISIONS = {"float32": [], "bfloat16": ["--amp"], "float16": ["--amp", "--amp-dtype=float16"]}
NETWORKS = ("PreActResNet18", "ResNet18", "WideResNet")

# Operations whose result the host needs to continue. Decompositions read theirs within PyTorch.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "bincount", "repeat_interleave",
         "unique_dim", "_unique", "_unique2", "unique_consecutive"}
DECOMPOSITIONS = ("_linalg", "linalg", "cholesky", "geqrf")
NORMS = {"linalg_vector_norm", "linalg_matrix_norm"}

# What an audit may find, with the reason. The nuclear norm and its gradient have no exact form without a decomposition:
# NuAT makes one in every loss (2 steps) and one in the attack of every second batch.
KNOWN = {"nuat": {"_linalg_svd": 2 + 1}}
# Before an attack, the starts of all images are copied: they are drawn on the CPU, the same for every device.
EVALUATOR = {"_to_copy": 1}

# Code that waits, added to FGSM: what the audit has to find.
PLANTED = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense"),
    "if": (lambda x: bool(x.sum() > 0), "_local_scalar_dense"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"), "mask": (lambda x: x[x > 0], "nonzero"),
    "cpu": (lambda x: x.cpu(), "_to_copy"),
    "tensor": (lambda x: torch.tensor(0.5, device=x.device), "_to_copy"),
    "singular values": (lambda x: torch.linalg.svdvals(x.flatten(1)), "_linalg_svd"),
    "eigenvalues": (lambda x: torch.linalg.eigvalsh(x[0, 0]), "_linalg_eigh"),
    "device": (lambda x: x + torch.zeros(len(x), 1, 1, 1), "add"),
}


class Audit(TorchDispatchMode):
    """Counts, by name, the operations for which the host waits for the GPU, and those with tensors of both."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.name().removeprefix("aten::").partition(".")[0]
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if name in ("index", "index_put_") and any(each is not None and each.dtype is torch.bool for each in args[1]):
            name = "nonzero"  # of the mask
        devices = {each.device.type for each in tensors}
        if name == "_to_copy" and kwargs.get("device"):
            devices.add(torch.device(kwargs["device"]).type)
        decomposes = name.startswith(DECOMPOSITIONS) and name not in NORMS
        if name in READS or decomposes or len(devices) > 1:
            self.found[name] += 1
        return operation(*args, **kwargs)


@contextlib.contextmanager
def on_fake_cuda():
    """Context of an audit. Mixed precision takes CUDA for available; networks, of which fake ones cannot be moved, stay
    where they are."""
    with (mock.patch.object(FakeTensorMode, "__deepcopy__", lambda self, memo: self, create=True), FakeTensorMode(),
          torch.autograd.set_multithreading_enabled(False),
          mock.patch.object(nn.Module, "to", lambda self, *args, **keywords: self),
          mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
          mock.patch("torch.cuda.is_bf16_supported", lambda: True)):
        yield


def images(n: int) -> Images:
    return Images(torch.zeros(n, 32, 32, 3, dtype=torch.uint8), torch.zeros(n, dtype=torch.long))


def audited_steps(method: str, *flags: str, network=SmallNet) -> Counter:
    """Audit the first step of the first epoch, and in the second epoch the step on the second batch, a smaller one."""
    args = options.parse(options.CIFAR10, argv=[
        "--batch-size=4", "--epochs=9", "--lr-max=0.1", "--ema=0.9", "--eps-warmup=5", "--pgd-iters=2",
        "--atas-warmup=1", f"--method={method}", *flags])
    world = World(device=CUDA)
    with on_fake_cuda():
        with CUDA:  # new tensors are there
            state, _ = train.build(options.CIFAR10, args, CUDA, world, network())
            run = train.assemble(options.CIFAR10, args, state, Folder(None), world, StopSignals(), [images(7)] * 3)
            order, drawn = torch.zeros(7, dtype=torch.long), run.augmentation.draw(7)
        state.model.train()
        with Audit() as audit:
            try:
                for state.epoch, state.step in ((0, 0), (1, run.replays)):
                    train.train_step(run, train.batch(run, order, drawn))
            except RuntimeError:  # fake tensors answer nothing
                if not audit.found:
                    raise
    return audit.found


def audited_planted(work) -> Counter:
    def fgsm(model, x, *rest, fgsm=attacks.fgsm, **keywords):
        work(x)
        return fgsm(model, x, *rest, **keywords)

    with mock.patch.object(attacks, "fgsm", fgsm):
        return audited_steps("fgsm")


def audited_evaluator(flags: list[str], network=SmallNet) -> Counter:
    """Audit the evaluation of 64 images at once without a perturbation, and three steps of an attack."""
    args = options.parse(options.CIFAR10, argv=flags)
    with on_fake_cuda(), mock.patch.object(robustness, "read", lambda *counts: [64] * len(counts)):
        with CUDA:
            model, whole = network(), images(64)
        events = attack_steps(model, whole, PGD(0.1, 0.1, 9, 1), 64, Precision(args, CUDA))
        with Audit() as audit:
            assert len(list(itertools.islice(events, 5))) == 5  # the clean images, a restart, three steps
    return audit.found


def audits() -> dict[str, dict[str, int]]:
    found = {}
    library = torch.library.Library("aten", "IMPL", "Meta")
    library.impl("_fused_sgd_", lambda *args, **keywords: None)  # which fake tensors do not have yet
    for precision, flags in PRECISIONS.items():
        for method in methods.METHODS:
            found[f"{method}, {precision}"] = audited_steps(method, *flags)
        found[f"evaluates, {precision}"] = audited_evaluator(flags)
    for name in NETWORKS:
        found[name] = audited_evaluator(["--amp"], getattr(networks, name))
    for name, (work, _) in PLANTED.items():
        found[f"planted {name}"] = audited_planted(work)
    return found


# PyTorch's answers to "which accelerator is there?" and "is this device one?".
WITHOUT_ACCELERATORS = """
short _ZN2at11accelerator14getAcceleratorEb(_Bool checked) { return 0; }
_Bool _ZN2at11accelerator13isAcceleratorEN3c1010DeviceTypeE(signed char type) { return 0; }
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, int]]:
    environment = dict(os.environ)
    if torch.version.cuda and not torch.cuda.is_available():
        library = tmp_path_factory.mktemp("library") / "none.so"
        try:
            subprocess.run(["cc", "-shared", "-fPIC", "-xc", "-", "-o", library], input=WITHOUT_ACCELERATORS, text=True,
                           check=True)
        except FileNotFoundError:
            pytest.skip("needs a C compiler, a GPU, or PyTorch without CUDA")
        environment["LD_PRELOAD"] = str(library)
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True,
                          env={**environment, "PYTHONPATH": root})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_training_step_waits_for_the_gpu(precision, found):
    for method in methods.METHODS:
        assert found[f"{method}, {precision}"] == KNOWN.get(method, {}), method


@pytest.mark.parametrize("name", NETWORKS)
def test_no_network_waits_for_the_gpu(name, found):
    assert found[name] == EVALUATOR


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_of_the_evaluator_waits_where_it_reads_and_nowhere_else(precision, found):
    assert found[f"evaluates, {precision}"] == EVALUATOR


@pytest.mark.parametrize("name", PLANTED)
def test_the_audit_finds_a_wait_that_is_added_to_a_method(name, found):
    assert PLANTED[name][1] in found[f"planted {name}"]


if __name__ == "__main__":
    print(json.dumps(audits()))
