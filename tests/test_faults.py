"""What goes wrong around a run: a full disk, a loss that explodes, files and command lines that make no sense."""
import hashlib
import random
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import DATASETS, ROOT, SMALL, assert_same, epochs_of, script
from test_data import write_cifar10, write_svhn
from test_scripts import one_line
from torchvision import datasets

import data
import options
import run

TINY = ["--dummy", "--device=cpu", "--base-width=4", "--batch-size=8", "--train-samples=8", "--epochs=2",
        "--test-iters=1", "--final-iters=1", "--final-restarts=1", "--final-samples=1", "--chkpt-iters=1",
        "--attack=fgsm"]


def test_a_closed_standard_output_costs_no_epoch(tmp_path):
    flags = [*SMALL, "--attack=fgsm", "--fname", str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, str(ROOT / "train_cifar.py"), *flags], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith("Epoch")
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert error == "train_cifar.py: error: standard output was closed; --resume auto goes on\n"
    done = script("train_cifar.py", *flags, "--resume=auto")
    assert done.returncode == 0 and "# resumed at epoch 1, step 0" in done.stdout


def files(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The bytes after a few of the things that befall files."""
    for _ in range(chance.choice((1, 1, 2, 5))):
        at, length = chance.randrange(len(content) + 1), chance.choice((1, 1, 2, 8, 300))
        kind = chance.randrange(5)
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content = content[:at] + content[at + length:]
        elif kind == 2:
            content = content[:at] + chance.randbytes(length) + content[at + length:]
        elif kind == 3:
            content = content[:at] + chance.randbytes(length) + content[at:]
        else:
            content = content[:at] + bytes(length) + content[at + length:]
    return content


def ends_well(result) -> None:
    """Success, or one line and status 2."""
    status, _, error = result
    if status != 0:
        assert status == 2 and error.count("\n") == 1 and "error: " in error and "Traceback" not in error, error


def runs_on_mutated_checkpoints(n: int, seed: int, tmp_path, call, monkeypatch):
    """n times: the name of a checkpoint, what a run that goes on from it mutated ended with, and both folders."""
    monkeypatch.setattr(data, "DUMMY_SIZES", {True: 16, False: 8})
    chance = random.Random(seed)
    whole = tmp_path / "whole"
    assert call("train_cifar.py", *TINY, "--epochs=1", "--fname", whole)[0] == 0
    for i in range(n):
        name = chance.choice(("model_0.pth", "opt_0.pth", "state.pth"))
        folder = tmp_path / str(i)
        shutil.copytree(whole, folder)
        (folder / name).write_bytes(mutated((whole / name).read_bytes(), chance))
        if name == "state.pth":
            for pair in ("model_0.pth", "opt_0.pth"):
                (folder / pair).unlink()
        before = files(folder)
        resume = "--resume=auto" if name == "state.pth" else "--resume=1"
        result = call("train_cifar.py", *TINY, "--allow-changes", "--fname", folder, resume)
        if result[0] == 2:
            assert files(folder) == before
        assert not list(folder.glob("**/*.part"))
        yield name, result, folder, whole
        shutil.rmtree(folder)


def test_mutated_checkpoints_end_in_one_line_or_with_the_same_content(tmp_path, call, monkeypatch):
    statuses = []
    for name, result, folder, whole in runs_on_mutated_checkpoints(500, 0, tmp_path, call, monkeypatch):
        ends_well(result)
        statuses.append(result[0])
        if result[0] == 0 and name == "model_0.pth":  # what was changed was not the content
            assert_same(*(torch.load(place / name, weights_only=True) for place in (folder, whole)))
    assert statuses.count(2) > 400


@pytest.mark.parametrize("part", range(2))
def test_mutated_checkpoints_whose_sums_are_right_end_in_success_or_one_line(part, tmp_path, call, monkeypatch):
    """As far as PyTorch reads them; the checks of the content see what the sums would have caught."""
    monkeypatch.setattr("zipfile.is_zipfile", lambda path: False)
    for _, result, _, _ in runs_on_mutated_checkpoints(100, part, tmp_path, call, monkeypatch):
        if result[0] == 1:  # a weight that the mutation made huge; the run says so
            assert "no longer finite" in result[2] and result[2].count("\n") == 1
        else:
            ends_well(result)


def test_mutated_svhn_files_end_in_success_or_one_line(tmp_path, call, monkeypatch):
    """Also where the sum is that of the mutated file, so that the parser sees it."""
    write_svhn(tmp_path / "data", monkeypatch)
    monkeypatch.setattr(run.Run, "train", lambda self: None)
    chance, path = random.Random(0), tmp_path / "data" / "train_32x32.mat"
    whole, sums = path.read_bytes(), dict(datasets.SVHN.split_list)
    flags = [flag for flag in TINY if flag not in ("--dummy", "--train-samples=8")]
    for i in range(500):
        path.write_bytes(mutated(whole, chance))
        known = [*sums["train"][:2], hashlib.md5(path.read_bytes()).hexdigest()] if i % 5 else sums["train"]
        monkeypatch.setattr(datasets.SVHN, "split_list", {**sums, "train": known})
        ends_well(call("train_svhn.py", *flags, "--data-dir", tmp_path / "data", "--fname", tmp_path / "run"))


def test_mutated_cifar_pickles_are_never_opened(tmp_path, call, monkeypatch):
    folder, _ = write_cifar10(tmp_path / "data", monkeypatch)
    chance, flags = random.Random(0), [flag for flag in TINY if flag != "--dummy"]
    opened = []
    for _ in range(500):
        path = folder / chance.choice(("data_batch_1", "data_batch_5", "test_batch", "batches.meta"))
        whole = path.read_bytes()
        path.write_bytes(mutated(whole, chance))
        if path.read_bytes() != whole:
            with monkeypatch.context() as patch:
                patch.setattr("pickle.load", lambda *args, **options: opened.append(args))
                result = call("train_cifar.py", *flags, "--data-dir", tmp_path / "data", "--fname", tmp_path / "run")
            one_line(result, path.name)
        path.write_bytes(whole)
    assert not opened and not (tmp_path / "run").exists()


def test_mutated_command_lines_end_in_success_or_one_line(tmp_path, call, monkeypatch):
    """2,000 of them, up to where training would begin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DUMMY_SIZES", {True: 16, False: 8})
    monkeypatch.setattr(run.Run, "train", lambda self: None)
    chance = random.Random(0)
    known = options.flag_of(options.parser(DATASETS["train_cifar.py"], None)).values()
    flags = sorted(set(known) - {"-h", "--base-width"})
    values = ["", "0", "1", "2", "4", "-1", "3", "0.1", "0.35", "1.5", "2e0", "nan", "-inf", "inf", "auto", "cpu",
              "cuda", "zero", "x", "-", "random", "fgsm", "pgd", "zerograd", "onedrop", "--", "%s", "é",
              "\uff11", "1_0", "0x8", "/", ".", "a\nb", "\0", "99999999999999999999", "PreActResNet34",
              "float16", "state.pth"]
    outcomes = []
    for _ in range(2000):
        line = list(TINY)
        for _ in range(chance.choice((1, 1, 2, 3))):
            flag = chance.choice(flags)
            kind = chance.randrange(4)
            line += [[f"{flag}={chance.choice(values)}"], [flag], [flag, chance.choice(values)],
                     [chance.choice((flag[:-1], flag + "s", flag.upper(), flag[1:]))]][kind]
        before = sorted(tmp_path.rglob("*"))
        result = call(chance.choice(sorted(DATASETS)), *line)
        ends_well(result)
        outcomes.append(result[0])
        if result[0] == 2:
            assert sorted(tmp_path.rglob("*")) == before
    assert outcomes.count(0) > 80 and outcomes.count(2) > 800


def test_a_full_disk_leaves_the_old_checkpoint_and_no_part_of_a_new_one(tmp_path, call):
    flags = [*SMALL, "--chkpt-iters=1", "--attack=fgsm", "--fname", tmp_path / "run"]
    assert call("train_cifar.py", *flags, "--epochs=3")[0] == 0
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "run", whole)
    part = tmp_path / "run"
    for name in ("final.json", "model_2.pth", "opt_2.pth"):
        (part / name).unlink()
    torch.save({"model": torch.load(part / "model_1.pth", weights_only=True),
                "opt": torch.load(part / "opt_1.pth", weights_only=True)}, part / "state.pth")
    before = files(part)
    for limit in (20_000, 100_000, 200_000):  # less than a checkpoint, wherever in it
        done = script("train_cifar.py", *flags, "--epochs=3", "--resume=auto", "--chkpt-steps=1",
                      preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "File too large" in done.stderr, done.stderr
        after = files(part)
        assert len(after["state.pth"]) > limit
        assert all(after[name] == before[name] for name in before if name.endswith(".pth"))
        assert not list(part.glob(".*.part"))
    assert call("train_cifar.py", *flags, "--epochs=3", "--resume=auto")[0] == 0
    for name in ("state.pth", "model_2.pth"):
        assert_same(torch.load(tmp_path / "run" / name, weights_only=True), torch.load(whole / name, weights_only=True))
    assert [record["epoch"] for record in epochs_of(tmp_path / "run")] == [0, 1, 2]


def test_a_loss_that_explodes_names_epoch_step_and_the_last_good_state(tmp_path, call, small_dummy):
    flags = [*SMALL, "--attack=fgsm", "--fname", tmp_path / "run"]
    status, _, error = call("train_cifar.py", *flags, "--lr-max=1e30")
    assert status == 1 and error.count("\n") == 1
    assert "no longer finite at epoch 0, step 1; no state was saved before: lower --lr-max" in error
    assert not list((tmp_path / "run").glob("*.pth"))
    assert call("train_cifar.py", *flags, "--epochs=1")[0] == 0
    good = (tmp_path / "run" / "state.pth").read_bytes()
    changed = [*flags, "--epochs=2", "--lr-max=1e30", "--allow-changes", "--resume=auto"]
    status, _, error = call("train_cifar.py", *changed)
    assert status == 1 and "at epoch 1, step" in error and "the last good state is" in error and "state.pth" in error
    assert (tmp_path / "run" / "state.pth").read_bytes() == good


@pytest.mark.parametrize("flags", [["--epochs=1"], ["--epochs=1", "--chkpt-steps=1"], ["--epochs=2", "--resume=auto"]])
def test_weights_that_the_last_step_blew_up_are_neither_saved_nor_reported(flags, tmp_path, call, small_dummy):
    """No loss or gradient tells of them any more."""
    one_step = [*SMALL, "--attack=fgsm", "--train-samples=32", "--chkpt-iters=1", "--fname", tmp_path / "run"]
    if "--resume=auto" in flags:
        assert call("train_cifar.py", *one_step, "--epochs=1")[0] == 0
    before = files(tmp_path / "run") if "--resume=auto" in flags else {}
    status, _, error = call("train_cifar.py", *one_step, *flags, "--lr-max=1e38", "--allow-changes")
    assert status == 1 and error.count("\n") == 1 and ", step 0; " in error, error
    after = files(tmp_path / "run")
    assert {name: content for name, content in after.items() if name.endswith(".pth")} == {
        name: content for name, content in before.items() if name.endswith(".pth")}
    assert "nan" not in after.get("metrics.jsonl", b"").decode().lower()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")])
def test_out_of_memory_names_the_flag_to_lower(error, tmp_path, call, small_dummy, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(run, "train_epoch", fail)
    status, _, line = call("train_cifar.py", *SMALL, "--fname", tmp_path / "run")
    assert status == 1 and line.endswith(": error: out of memory: lower --batch-size (now 32)\n")
