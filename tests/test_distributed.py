"""Two gloo processes under torchrun, on this machine, against one."""
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, assert_same_run, epochs_of, script

from distributed import World

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def torchrun(name: str, *flags: str, launcher: tuple[str, ...] = (), **options) -> subprocess.CompletedProcess:
    return subprocess.run([*TORCHRUN, *launcher, name, *map(str, flags)], capture_output=True, text=True, timeout=280,
                          cwd=ROOT, **options)


def test_two_processes_train_about_as_well_as_one_and_evaluate_alike(tmp_path):
    flags = [*SMALL, "--train-samples=768", "--epochs=4", "--lr-schedule=cyclic", "--lr-max=0.2", "--base-width=8",
             "--attack=multigrad", "--multi-parallel"]
    for count, start in (("one", script), ("two", torchrun)):
        done = start("train_cifar.py", *flags, "--fname", tmp_path / count)
        assert done.returncode == 0, done.stderr
    one, two = (epochs_of(tmp_path / count) for count in ("one", "two"))
    assert len(two) == 4 and [record["train_images"] for record in two] == [768] * 4
    assert json.loads((tmp_path / "two" / "args.json").read_text())["starts"][0]["processes"] == 2
    for left, right in zip(one, two):
        assert left["test_images"] == right["test_images"] and left["lr"] == right["lr"]
    assert one[-1]["test_images"] == 512 and min(one[-1]["test_acc"], two[-1]["test_acc"]) > 0.8
    for name in ("test_acc", "test_robust_acc", "train_robust_acc"):
        assert abs(one[-1][name] - two[-1][name]) < 0.1, name
    # One process evaluates what two have trained, and finds the very counts that they found.
    done = script("train_cifar.py", *flags, "--fname", tmp_path / "two", "--eval", "--resume=auto")
    assert done.returncode == 0, done.stderr
    alone, together = (json.loads((tmp_path / "two" / name).read_text()) for name in ("eval.json", "final.json"))
    assert (alone["clean_acc"], alone["robust_acc"]) == (together["clean_acc"], together["robust_acc"])
    cells = (tmp_path / "two" / "eval.log").read_text().splitlines()[1].split("\t")
    assert cells[7] == f"{two[-1]['test_acc']:.4f}" and cells[9] == f"{two[-1]['test_robust_acc']:.4f}"


GRADIENTS = """
import sys, torch
from functools import partial
from torch import nn
from attacks import fgsm
from data import Augmentation, Images
from distributed import World
from engine import Progress, Trainer, closing_attack, evaluate, train_epoch
from precision import Precision
from preactresnet import PreActResNet18

world = World.join(torch.device("cpu"))
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
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
attack = partial(fgsm, epsilon=8 / 255, alpha=8 / 255, init="zero")
precision = Precision(False, "bfloat16", "native", torch.device("cpu"))
trainer = Trainer(model, forward, optimizer, attack, lambda t: 0.01, images, Augmentation(), 12, 0, precision, world)
metrics = train_epoch(trainer, Progress())
counts = evaluate(model, images, attack, 2, 5, (0,), precision, world)
closing = closing_attack(model, images, 1 / 255, 0.5 / 255, 3, 3, 4, 0, precision, world)
if world.is_main:
    del metrics["train_time"]
    torch.save({"model": model.state_dict(), "metrics": metrics, "counts": counts, "closing": closing}, sys.argv[1])
world.barrier()
world.leave()
"""


def test_gradients_are_averaged_over_shards_of_unequal_size(tmp_path):
    """An epoch of batches of 12, 12 and 3, BatchNorm in eval mode: one process and two agree to rounding."""
    program = tmp_path / "program.py"
    program.write_text(GRADIENTS)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, program, tmp_path / "one.pt"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    done = torchrun(str(program), tmp_path / "two.pt", env=env)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-9, atol=1e-11)
    for part in ("metrics", "counts", "closing"):
        for key, value in one[part].items():
            assert two[part][key] == pytest.approx(value, rel=1e-6), key


def test_a_process_that_dies_ends_the_run_and_a_restart_goes_on(tmp_path):
    """One of two processes is killed in the second epoch; torchrun starts both again, from the newest state."""
    program = tmp_path / "dying.py"
    program.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import run, train_cifar\n"
        "after_step = run.Run.after_step\n"
        "def dying(self):\n"
        "    after_step(self)\n"
        "    first_life = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "    if first_life and self.world.rank == 1 and self.progress.epoch == 1 and self.progress.step == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "run.Run.after_step = dying\n"
        "run.main(train_cifar.DATASET)\n")
    flags = [*SMALL, "--epochs=3", "--attack=fgsm", "--resume=auto"]
    whole = torchrun("train_cifar.py", *flags, "--fname", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    died = torchrun(str(program), *flags, "--fname", tmp_path / "part")
    assert died.returncode != 0 and "SIGKILL" in died.stderr
    # Without this setting torchrun's new processes may read the dead ones' addresses from a store that they share.
    env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    flags += ["--fname", tmp_path / "restarted"]
    again = torchrun(str(program), *flags, launcher=("--max-restarts=1",), env=env)
    assert again.returncode == 0, again.stderr
    assert "# resumed at epoch 1, step 0" in again.stdout
    assert_same_run(tmp_path / "restarted", tmp_path / "whole")


@pytest.mark.parametrize("during, slow, goes_on", [
    ("train_epoch", ["--attack=pgd", "--pgd-iters=20", "--train-samples=2048"], "# resumed at epoch 0, step "),
    ("evaluate", ["--test-iters=100"], "# resumed at epoch 0, step 3 "),
    ("closing_attack", ["--final-iters=1", "--final-restarts=100000"], "# resumed at epoch 1, step 0 "),
])
def test_sigterm_to_one_process_stops_both_and_the_run_goes_on(during, slow, goes_on, tmp_path):
    program = tmp_path / "told.py"
    program.write_text(
        "import os, signal, sys, threading\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import run, train_cifar\n"
        f"original = run.{during}\n"
        "def told(*args, **kwargs):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    return original(*args, **kwargs)\n"
        f"run.{during} = told\n"
        "run.main(train_cifar.DATASET)\n")
    flags = [*SMALL, "--epochs=1", "--resume=auto", "--fname", tmp_path / "run", *slow]
    stopped = torchrun(str(program), *flags)
    assert stopped.returncode != 0 and "stopped by SIGTERM; --resume auto" in stopped.stderr
    assert not (tmp_path / "run" / "final.json").exists()
    fast = ["--pgd-iters=1", "--test-iters=1", "--final-restarts=1", "--allow-changes"]
    again = torchrun("train_cifar.py", *flags, *fast)
    assert again.returncode == 0, again.stderr
    assert goes_on in (tmp_path / "run" / "output.log").read_text()
    assert [record["epoch"] for record in epochs_of(tmp_path / "run")] == [0]


def test_sigterm_to_torchrun_itself_leaves_time_to_save_also_where_steps_are_slow(tmp_path):
    """torchrun passes it on and kills its processes half a minute later: that is not to be twenty steps' time."""
    program = tmp_path / "slow.py"
    program.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import run, train_cifar\n"
        "after_step = run.Run.after_step\n"
        "def slow(self):\n"
        "    time.sleep(2)\n"
        "    after_step(self)\n"
        "run.Run.after_step = slow\n"
        "run.main(train_cifar.DATASET)\n")
    flags = [*SMALL, "--train-samples=2048", "--attack=fgsm", "--fname", str(tmp_path / "run")]
    process = subprocess.Popen([*TORCHRUN, str(program), *flags], text=True, cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(5)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert "stopped by SIGTERM; --resume auto" in error, error
    assert torch.load(tmp_path / "run" / "state.pth", weights_only=True)["opt"]["run"]["step"] > 0


def test_processes_that_do_not_share_the_folder_are_told_so(tmp_path):
    program = tmp_path / "apart.py"
    program.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import run, train_cifar\n"
        "run.main(train_cifar.DATASET, argv=[*sys.argv[1:], '--fname', sys.argv[0] + os.environ['RANK']])\n")
    for folder, epochs in (("apart.py0", 1), ("apart.py1", 2)):
        assert script("train_cifar.py", *SMALL, f"--epochs={epochs}", "--fname", tmp_path / folder).returncode == 0
    done = torchrun(str(program), *SMALL, "--epochs=3", "--resume=auto", "--allow-changes")
    assert done.returncode != 0 and "has to be the same folder for all processes" in done.stderr


@pytest.mark.parametrize("size", ("2", "many"))
def test_a_world_that_torchrun_did_not_make_is_one_line(size, tmp_path):
    env = {**os.environ, "WORLD_SIZE": size}
    done = script("train_cifar.py", *SMALL, "--fname", tmp_path / "run", env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"WORLD_SIZE is {size}" in done.stderr, done.stderr


def test_one_process_asks_no_device_which_value_is_the_largest():
    assert World().max(True, torch.device("meta")) is True  # from that device nothing could be read


def test_a_last_batch_too_small_for_the_processes_is_one_line(tmp_path):
    done = torchrun("train_cifar.py", *SMALL, "--train-samples=65", "--fname", tmp_path / "run")
    assert done.returncode != 0 and "error: --train-samples or --batch-size leaves fewer" in done.stderr
    assert not (tmp_path / "run").exists()
