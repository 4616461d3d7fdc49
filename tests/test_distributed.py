"""Two gloo processes on this machine against one; under torchrun where its own part is tested."""
import json
import os
import runpy
import shutil
import subprocess
import sys
import time

import pytest
import torch
from helpers import IMAGES, ROOT, SIDE, SMALL, assert_same_run, epochs_of, linear_network, one_line
from processes import forked, together

from singlestep import train
from singlestep.run.distributed import World

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def torchrun(name: str, *flags: str, launcher: tuple[str, ...] = (), **options) -> subprocess.CompletedProcess:
    return subprocess.run([*TORCHRUN, *launcher, name, *map(str, flags)], capture_output=True, text=True, timeout=550,
                          cwd=ROOT, **options)


def program(path, change: str) -> str:
    """train_cifar.py on small synthetic images, after a change to the modules; returns its path."""
    path.write_text(f"import os, signal, sys, threading, time\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\n"
                    "from singlestep import data, options, train\n"
                    f"data.DUMMY_SIZES, data.DUMMY_SIDE = {IMAGES}, {SIDE}\n"
                    f"{change}\ntrain.main(options.CIFAR10, options.parse(options.CIFAR10))\n")
    return str(path)


# `changed(run)` is called after every step.
AFTER_STEP = """
class Changed(train.AfterStep):
    def __call__(self):
        changed(self.run)
        super().__call__()
train.AfterStep = Changed
"""


def test_two_processes_train_about_as_well_as_one(tmp_path):
    """With this epsilon, each of three seeds ended with 100% of the test images right, and 91 to 96% in training."""
    learnable = program(tmp_path / "learnable.py", "data.DUMMY_SIZES[True] = 768")
    flags = [*SMALL, "--train-samples=768", "--batch-size=64", "--epochs=5", "--lr-schedule=cyclic", "--lr-max=0.2",
             "--base-width=8", "--epsilon=1", "--attack=multigrad", "--multi-samps=2", "--multi-parallel"]
    for name, run in (("one", forked), ("two", together)):
        done = run(learnable, *flags, "--fname", tmp_path / name)
        assert done.returncode == 0, done.stderr
    one, two = (epochs_of(tmp_path / count) for count in ("one", "two"))
    assert len(two) == 5 and [record["train_images"] for record in two] == [768] * 5
    assert json.loads((tmp_path / "two" / "args.json").read_text())["starts"][0]["processes"] == 2
    for left, right in zip(one, two):
        assert left["test_images"] == right["test_images"] and left["lr"] == right["lr"]
    assert one[-1]["test_images"] == 64 and min(one[-1]["test_acc"], two[-1]["test_acc"]) > 0.8
    for name in ("test_acc", "test_robust_acc", "train_robust_acc"):
        assert abs(one[-1][name] - two[-1][name]) < 0.1, name


def test_one_process_finds_the_very_counts_that_two_found(tmp_path, call, small_dummy, monkeypatch):
    """In the evaluations of an epoch and of a whole run."""
    linear = program(tmp_path / "linear.py", "from helpers import linear_network\ntrain.new_network = linear_network")
    monkeypatch.setattr(train, "new_network", linear_network)
    flags = [*SMALL, "--attack=fgsm", "--lr-max=0", "--fname", tmp_path / "run"]
    done = together(linear, *flags)
    assert done.returncode == 0, done.stderr
    assert call("train_cifar.py", *flags, "--eval", "--resume=auto")[0] == 0
    (evaluation,), final = (json.loads((tmp_path / "run" / name).read_text()) for name in
                            ("evaluation.json", "final.json"))
    alone, together_ = evaluation["final"], epochs_of(tmp_path / "run")[-1]
    assert (alone["clean_acc"], alone["robust_acc"]) == (final["clean_acc"], final["robust_acc"])
    assert 0 < alone["robust_acc"] < alone["clean_acc"] < 1
    for name in ("test_acc", "test_robust_acc", "fgsm_acc"):
        assert evaluation[name] == together_[name], name
    cells = (tmp_path / "run" / "eval.log").read_text().splitlines()[1].split("\t")
    assert cells[7] == f"{together_['test_acc']:.4f}" and cells[9] == f"{together_['test_robust_acc']:.4f}"


GRADIENTS = """
import argparse, sys, torch
from functools import partial
from torch import nn
from singlestep.attacks import fgsm
from singlestep.run.folder import Folder
from singlestep.run.state import State
from singlestep.data import Augmentation, Images
from helpers import evaluated
from singlestep.options import Args
from singlestep.robustness import PGD
from singlestep.run.device import Precision
from singlestep.run.distributed import World
from singlestep.objectives import ce
from singlestep.networks import PreActResNet18
from singlestep.train import Run, train_epoch
from singlestep.run.console import StopSignals

device = torch.device("cpu")
world = World.join(device)
torch.manual_seed(0)

class Steady(nn.Module):
    # In float64, so that rounding turns no sign over, and with BatchNorm in eval mode.
    def __init__(self):
        super().__init__()
        self.network = PreActResNet18(base_width=4).double()
    def forward(self, x):
        return self.network(x.double())
    def train(self, mode=True):
        return super().train(False)

model = Steady().eval()
pixels, labels = torch.randint(256, (27, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (27,))
images = Images(pixels, labels, torch.contiguous_format)
forward = nn.parallel.DistributedDataParallel(model) if world.size > 1 else model
args = Args(batch_size=12, seed=0, epsilon=8, amp=False, amp_dtype="bfloat16", tf32=True, epochs=1,
                          attack="fgsm", objective="ce", eps_warmup=0)
state = State(model, torch.optim.SGD(model.parameters(), lr=0.1), Precision(args, device))
run = Run(args, state, Folder(sys.argv[1]), world, StopSignals(), model, forward,
          partial(fgsm, init="zero"), ce, 8 / 255, lambda t: 0.01, lambda t: 0.0, Augmentation(), images, images[:0],
          images)
metrics = train_epoch(run)
del metrics["train_time"]
weak, strong = (evaluated(model, images, PGD(epsilon / 255, 0.5 / 255, 3, restarts), 5, state.precision, world)
                for epsilon, restarts in ((1, 3), (8, 1)))
if world.is_main:
    torch.save({"model": model.state_dict(), "metrics": metrics, "weak": weak.metrics(), "strong": strong.metrics()},
               sys.argv[1])
world.leave()
"""


def test_gradients_are_averaged_over_shards_of_unequal_size(tmp_path, monkeypatch):
    """An epoch of batches of 12, 12 and 3, BatchNorm in eval mode: one process and two agree to rounding."""
    path = tmp_path / "gradients.py"
    path.write_text(GRADIENTS)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), str(tmp_path / "one.pt")])
        runpy.run_path(str(path))
    done = together(path, tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-9, atol=1e-11)
    for part in ("metrics", "weak", "strong"):
        for key, value in one[part].items():
            assert two[part][key] == pytest.approx(value, rel=1e-6), key


WATCHED = """
import torch
from helpers import SmallNet

seen, measure = {"noise": [], "mean": [], "whole": [], "training": [], "evaluation": []}, train.measure

def buffers(model):
    return torch.cat([buffer.double().flatten() for buffer in model.buffers()])

class Watched(SmallNet):
    def forward(self, x):
        if self.training:
            seen["training"].append(buffers(self))
        return super().forward(x)

def attack(model, x, y, epsilon, step):
    seen["noise"].append(torch.rand(3))
    seen["mean"].append(step.mean(step.index))
    seen["whole"].append(step.whole.double().mean())
    return torch.zeros_like(x)

def measured(run):
    found = measure(run)
    seen["evaluation"].append(buffers(run.state.model))
    return found

train.new_network = lambda dataset, args: Watched(classes=dataset.classes)
train.attacks.none, train.measure = attack, measured
train.finish = lambda run: torch.save({name: torch.stack(values) for name, values in seen.items()},
                                      run.folder.path / f"{run.world.rank}.pt")
"""


def test_processes_have_noise_of_their_own_and_means_and_buffers_in_common(tmp_path):
    """At every step: random numbers of the attack, a mean over the batch's images, BatchNorm's running statistics."""
    done = together(program(tmp_path / "watched.py", WATCHED), *SMALL, "--attack=none", "--fname", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first["noise"]) == 6 and (first["noise"] != second["noise"]).all()
    for name in ("training", "evaluation"):
        assert torch.equal(first[name], second[name]) and not torch.equal(first[name][0], first[name][1]), name
    for own in (first, second):
        torch.testing.assert_close(own["mean"], own["whole"])


def test_a_process_that_dies_ends_the_run_and_a_restart_goes_on(tmp_path):
    """One of two is killed within the second epoch; torchrun starts both again, from the newest state. The attack of
    trades reads the running statistics, of which a state holds those of one process."""
    dying = program(tmp_path / "dying.py", """
def changed(run):
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first_life and run.world.rank == 1 and run.state.epoch == 1 and run.state.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
""" + AFTER_STEP)
    flags = [*SMALL, "--epochs=3", "--method=trades", "--pgd-iters=2", "--chkpt-steps=1", "--resume=auto"]
    whole = together("train_cifar.py", *flags, "--fname", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    died = torchrun(dying, *flags, "--fname", tmp_path / "part")
    assert died.returncode != 0 and "SIGKILL" in died.stderr
    # Without this setting torchrun's new processes may read the dead ones' addresses from a store that they share.
    env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    flags += ["--fname", tmp_path / "restarted"]
    again = torchrun(dying, *flags, launcher=("--max-restarts=1",), env=env)
    assert again.returncode == 0 and "exitcode: -9" in again.stderr, again.stderr
    assert "# resumed after 1 epoch and " in again.stdout
    assert_same_run(tmp_path / "restarted", tmp_path / "whole")


@pytest.mark.parametrize("during, slow, goes_on", [
    ("train_epoch", ["--attack=pgd", "--pgd-iters=40", "--batch-size=4"], "# resumed after 0 epochs and "),
    ("measure", ["--test-iters=1", "--test-restarts=100000"], "# resumed after 0 epochs and 3 steps, from"),
    ("final_evaluation", ["--final-iters=1", "--final-restarts=100000"], "# resumed after 1 epoch, from"),
])
def test_sigterm_to_one_process_stops_both_and_another_goes_on(during, slow, goes_on, tmp_path, call):
    told = program(tmp_path / "told.py", f"""
original = train.{during}
def told(*args, **kwargs):
    if os.environ["RANK"] == "1":
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return original(*args, **kwargs)
train.{during} = told
""")
    flags = [*SMALL, "--epochs=1", "--resume=auto", "--fname", tmp_path / "run", *slow]
    stopped = together(told, *flags)
    assert stopped.returncode != 0 and "stopped by SIGTERM; --resume auto" in stopped.stderr
    assert not (tmp_path / "run" / "final.json").exists()
    fast = ["--pgd-iters=1", "--test-restarts=1", "--final-restarts=1", "--allow-changes"]
    status, _, error = call("train_cifar.py", *flags, *fast)
    assert status == 0, error
    assert goes_on in (tmp_path / "run" / "output.log").read_text()
    assert [record["epoch"] for record in epochs_of(tmp_path / "run")] == [0]


def test_sigterm_to_torchrun_itself_leaves_time_to_save_also_where_steps_are_slow(tmp_path):
    """torchrun passes it on and kills its processes half a minute later: that is not to be twenty steps' time."""
    slow = program(tmp_path / "slow.py", "changed = lambda run: time.sleep(2)\n" + AFTER_STEP)
    flags = [*SMALL, "--batch-size=3", "--attack=fgsm", "--fname", str(tmp_path / "run")]
    process = subprocess.Popen([*TORCHRUN, slow, *flags], text=True, cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(2)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert "stopped by SIGTERM; --resume auto" in error, error
    assert torch.load(tmp_path / "run" / "state.pth", weights_only=True)["opt"]["run"]["step"] > 0


def test_a_mistake_that_every_process_finds_is_said_once(tmp_path):
    done = together("train_cifar.py", *SMALL, "--attack=fgsm", "--compile", "--fname", tmp_path / "run")
    assert done.returncode != 0 and done.stderr.count("error: ") == 1, done.stderr
    assert "--compile on a CPU needs" in done.stderr


def test_the_first_process_alone_reads_and_decides(tmp_path, call, small_dummy):
    """Processes that do not share the folder go on from what the first one's holds, and write to no other."""
    apart = program(tmp_path / "apart.py", "sys.argv += ['--fname', sys.argv[0] + os.environ['RANK']]")
    flags = [*SMALL, "--attack=fgsm", "--final-model=best"]
    for folder, epochs in (("apart.py0", 1), ("apart.py1", 2)):
        assert call("train_cifar.py", *flags, f"--epochs={epochs}", "--fname", tmp_path / folder)[0] == 0
    shutil.copytree(tmp_path / "apart.py0", tmp_path / "shared")
    before = {path.name: path.read_bytes() for path in (tmp_path / "apart.py1").iterdir()}
    for name, where in ((apart, ()), ("train_cifar.py", ("--fname", tmp_path / "shared"))):
        done = together(name, *flags, "--epochs=2", "--resume=auto", "--allow-changes", *where)
        assert done.returncode == 0 and "# resumed after 1 epoch, from" in done.stdout, done.stderr
    assert_same_run(tmp_path / "apart.py0", tmp_path / "shared")
    assert {path.name: path.read_bytes() for path in (tmp_path / "apart.py1").iterdir()} == before


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_training_is_near_to_eager_in_one_process_and_in_two(tmp_path):
    """A last batch is short here, and so are its shares: they are not compiled. A process's whole batches have 16
    images in both, so that the compiler finds its own work again."""
    small = program(tmp_path / "small.py", """
from torch import nn
from singlestep.networks import PreActBlock
train.new_network = lambda dataset, args: nn.Sequential(  # of both kinds of block: a whole network compiles for minutes
    nn.Conv2d(3, 16, 3, padding=1, bias=False), PreActBlock(16, 16, 1), PreActBlock(16, 32, 2), nn.BatchNorm2d(32),
    nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, dataset.classes))
""")
    flags = [*SMALL, "--epochs=1", "--attack=zerograd", "--final-samples=16", "--base-width=16",
             "--compile-mode=reduce-overhead"]  # on a CPU, the default under another name
    for run, size in ((forked, ["--batch-size=16", "--train-samples=40"]), (together, ["--train-samples=80"])):
        for name in ("--compile", "--no-compile"):
            done = run(small, *flags, *size, name, "--fname", tmp_path / f"{run.__name__} {name}")
            assert done.returncode == 0, done.stderr
        compiled, eager = (epochs_of(tmp_path / f"{run.__name__} {name}")[0] for name in ("--compile", "--no-compile"))
        for key in ("train_robust_loss", "test_loss", "test_robust_loss", "defence_mean"):
            assert compiled[key] == pytest.approx(eager[key], rel=0.02), key
        final = json.loads((tmp_path / f"{run.__name__} --compile" / "final.json").read_text())
        assert final["images"] == 16


def test_what_a_checkpoint_left_on_the_cpu_goes_to_the_device_to_be_summed(monkeypatch):
    """NCCL takes CUDA's tensors alone."""
    devices = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values, operation: devices.append(values.device.type))
    many, alone = World(0, 2, torch.device("meta")), torch.zeros(3)
    many.sum(alone), many.min(alone)
    assert devices == ["meta", "meta"] and alone.device.type == "cpu"


@pytest.mark.parametrize("size", ("2", "many"))
def test_a_world_that_torchrun_did_not_make_is_one_line(size, tmp_path, call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    one_line(call("train_cifar.py", *SMALL, "--fname", tmp_path / "run"), f"WORLD_SIZE is {size}")


def test_one_process_asks_no_device_which_value_is_the_largest():
    assert World(device=torch.device("meta")).max(True) is True  # from that device nothing could be read


def test_a_last_batch_too_small_for_the_processes_is_one_line(tmp_path):
    done = together("train_cifar.py", *SMALL, "--train-samples=65", "--fname", tmp_path / "run")
    assert done.returncode != 0 and "error: the last batch has fewer images than processes (2)" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_the_first_process_finds_wrong_is_said_once(tmp_path):
    done = together("train_cifar.py", *SMALL, "--resume=1", "--fname", tmp_path / "run")
    assert done.returncode != 0 and done.stderr.count("model_0.pth is missing") == 1, done.stderr
    assert not (tmp_path / "run").exists()
