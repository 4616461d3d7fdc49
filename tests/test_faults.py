"""What goes wrong around a run: a full disk, a loss that explodes, files and command lines that make no sense."""
import argparse
import errno
import hashlib
import io
import json
import os
import pickle
import pty
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import types
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    DATASETS,
    ROOT,
    SMALL,
    TINY,
    assert_same,
    assert_same_run,
    epochs_of,
    evaluated,
    one_line,
    script,
    write_cifar10,
    write_svhn,
)
from processes import Started, forked
from torchvision import datasets

from singlestep import data, evaluation, figures, options, robustness, train
from singlestep.data import Images
from singlestep.networks import PreActResNet18
from singlestep.run.console import UsageError
from singlestep.run.device import NO_ROOM, Precision, slowdown
from singlestep.run.state import read_checkpoint


def test_a_closed_standard_output_costs_no_epoch(tmp_path):
    flags = [*TINY, "--pgd-alpha=8", "--lr-drop=1", "--fname", str(tmp_path / "run")]  # no notes before the first epoch
    process = subprocess.Popen([sys.executable, str(ROOT / "train_cifar.py"), *flags], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith("method")
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert error == "train_cifar.py: error: standard output was closed; --resume auto continues this run\n"
    done = forked("train_cifar.py", *flags, "--resume=auto")
    assert done.returncode == 0 and "# resumed after 1 epoch, from" in done.stdout


def test_closed_streams_cost_nothing(tmp_path, call):
    """Python has no sys.stdout or sys.stderr then, and the next file that is opened would get their numbers."""
    processes = {}
    for i, closed in enumerate((">&-", "2>&-", "<&- >&- 2>&-")):
        command = [sys.executable, str(ROOT / "train_cifar.py"), *TINY, "--fname", str(tmp_path / str(i))]
        processes[closed] = subprocess.Popen(["sh", "-c", f'exec "$@" {closed}', "sh", *command], text=True,
                                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert call("train_cifar.py", *TINY, "--fname", tmp_path / "whole")[0] == 0
    for i, (closed, process) in enumerate(processes.items()):
        output, error = process.communicate(timeout=120)
        assert process.returncode == 0 and not error and (output.count("/2  lr ") == 2) == (closed == "2>&-"), error
        assert_same_run(tmp_path / str(i), tmp_path / "whole")


@pytest.mark.parametrize("command", [["train_cifar.py", "--dummy"], ["evaluate.py", "run"]])
def test_ctrl_c_while_pytorch_is_imported_ends_at_once(command, tmp_path):
    """The import of libraries can lose a KeyboardInterrupt."""
    (tmp_path / "torch.py").write_text("import pathlib, time\ntry:\n    pathlib.Path('begun').touch()\n"
                                       "    time.sleep(60)\nexcept KeyboardInterrupt:\n    pass\n")
    name, *flags = command
    process = subprocess.Popen([sys.executable, str(ROOT / name), *flags], cwd=tmp_path, text=True,
                               env={**os.environ, "PYTHONPATH": str(tmp_path)}, stderr=subprocess.PIPE)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "" and process.returncode == -signal.SIGINT  # 130 in a shell


def test_a_package_that_is_missing_is_named(tmp_path, call, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("singlestep.run.device.version", missing)
    status, _, error = call("train_cifar.py", *TINY, "--fname", tmp_path / "run")
    expected = "error: No package metadata was found for torchvision: install or repair this package\n"
    assert status == 1 and error.endswith(expected)


class Unwritable(io.TextIOWrapper):
    """A standard output whose device answers with an error."""

    def __init__(self, path, number: int):
        super().__init__(open(path, "wb"))  # noqa: SIM115
        self.number = number

    def flush(self):
        if not os.path.samestat(os.fstat(self.fileno()), os.stat(os.devnull)):
            raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EAGAIN])
def test_a_standard_output_that_cannot_be_written_costs_nothing(number, tmp_path, call, evaluates, monkeypatch):
    run = tmp_path / "run"
    warning = f"warning: standard output cannot be written ({os.strerror(number)}): continuing without it\n"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Unwritable(tmp_path / "screen", number))
        result = call("train_cifar.py", *TINY, "--fname", run)
    assert result == (0, "", warning) and (run / "final.json").exists() and len(epochs_of(run)) == 2
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Unwritable(tmp_path / "screen", number))
        assert evaluates(run, "--attacks=clean", "--samples=4", "--device=cpu") == (0, "", warning)
    assert len(json.loads((run / "evaluation.json").read_text())) == 1


@pytest.mark.parametrize("flags", [["train_svhn.py", "--help"], ["train_cifar.py", "--method=list"],
                                   ["evaluate.py", "--help"], ["plot.py", "--help"]])
def test_a_text_that_no_file_holds_must_be_printed(flags):
    name, flag = flags
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(ROOT / name), flag], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, f"{name}: error: standard output: No space left on device\n")


def test_a_table_of_runs_must_be_printed_unless_a_figure_is_saved(tmp_path, call, call_main, monkeypatch):
    figure = tmp_path / "curves.png"
    assert call("train_cifar.py", *TINY, "--fname", tmp_path / "run")[0] == 0
    for flags, status, line in (([], 1, "figures.py: error: standard output: No space left on device\n"),
                                ([f"--out={figure}"], 0, "warning: standard output cannot be written (No space left on "
                                                         "device): continuing without it\n")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
            assert call_main(figures, tmp_path / "run", *flags) == (status, "", line)
    assert figure.exists()


@pytest.mark.parametrize("number, status", [(None, 0), (signal.SIGHUP, 129)])
def test_a_closed_terminal_ends_a_run_only_by_its_signal(number, status, tmp_path):
    """Where SIGHUP is ignored, a run continues."""
    leader, follower = pty.openpty()
    process = Started("train_cifar.py", *TINY, "--fname", tmp_path / "run", terminal=os.ttyname(follower))
    process.wait_for(tmp_path / "run" / "args.json")
    os.close(follower), os.close(leader)
    if number:
        process.send_signal(number)
    assert process.finish().returncode == status
    assert (tmp_path / "run" / "final.json").exists() == (status == 0)


def test_a_stream_that_knows_no_umlauts_trains_and_files_are_utf_8(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("train_cifar.py", *TINY, "--epochs=1", "--fname=läufe")[0] == 0
    done = script("train_cifar.py", *TINY, "--fname=läufe", "--resume=auto", "--allow-changes",
                  env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "resumed after 1 epoch, from l\\xe4ufe/state.pth" in done.stdout, done.stderr
    assert "from läufe/state.pth\n" in (tmp_path / "läufe" / "output.log").read_text(encoding="utf-8")
    assert len(epochs_of(tmp_path / "läufe")) == 2


@pytest.mark.parametrize("flag", ["--fname", "--data-dir"])
def test_an_empty_path_is_refused(flag, tmp_path, call, monkeypatch):
    """Most likely, the variable that it was to come from was not set."""
    monkeypatch.chdir(tmp_path)
    one_line(call("train_cifar.py", *TINY, f"{flag}="), f"{flag}: must be a path")
    assert not list(tmp_path.iterdir())


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


def stop_before_training(monkeypatch) -> None:
    """Have runs end well where, all being read and built, they would begin to write."""
    def stop(*args):
        sys.exit(0)

    monkeypatch.setattr(train, "start", stop)


def test_mutated_checkpoints_end_in_one_line_or_with_the_same_content(tmp_path, call, monkeypatch):
    monkeypatch.setattr(data, "DUMMY_SIZES", {True: 16, False: 8})
    chance, statuses = random.Random(0), []
    whole = tmp_path / "whole"
    assert call("train_cifar.py", *TINY, "--epochs=1", "--fname", whole)[0] == 0
    for i in range(100):
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
        ends_well(result)
        statuses.append(result[0])
        if result[0] == 2:
            assert files(folder) == before
        elif name == "model_0.pth":  # what was changed was not the content
            assert_same(*(torch.load(place / name, weights_only=True) for place in (folder, whole)))
        assert not list(folder.glob("**/*.part"))
        shutil.rmtree(folder)
    assert statuses.count(2) > 80


def test_mutated_svhn_files_end_in_success_or_one_line(tmp_path, call, monkeypatch):
    """Also where the sum is that of the mutated file, so that the parser sees it."""
    write_svhn(tmp_path / "data", monkeypatch)
    stop_before_training(monkeypatch)
    chance, path = random.Random(0), tmp_path / "data" / "train_32x32.mat"
    whole, sums = path.read_bytes(), dict(datasets.SVHN.split_list)
    flags = [flag for flag in TINY if flag not in ("--dummy", "--train-samples=8")]
    for i in range(100):
        path.write_bytes(mutated(whole, chance))
        known = [*sums["train"][:2], hashlib.md5(path.read_bytes()).hexdigest()] if i % 5 else sums["train"]
        monkeypatch.setattr(datasets.SVHN, "split_list", {**sums, "train": known})
        ends_well(call("train_svhn.py", *flags, "--data-dir", tmp_path / "data", "--fname", tmp_path / "run"))


def test_mutated_cifar_pickles_are_never_opened(tmp_path, call, monkeypatch):
    folder, _ = write_cifar10(tmp_path / "data", monkeypatch)
    chance, flags = random.Random(0), [flag for flag in TINY if flag != "--dummy"]
    opened = []
    for _ in range(100):
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
    """400 of them, up to where training would begin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DUMMY_SIZES", {True: 16, False: 8})
    stop_before_training(monkeypatch)
    chance = random.Random(1)
    known = options.parser(DATASETS["train_cifar.py"], None)._option_string_actions
    flags = sorted(known.keys() - {"-h", "--help", "--base-width"})
    values = ["", "0", "1", "2", "4", "-1", "3", "0.1", "0.35", "1.5", "2e0", "nan", "-inf", "inf", "auto", "cpu",
              "cuda", "zero", "x", "-", "random", "fgsm", "pgd", "zerograd", "onedrop", "%s", "é",
              "\uff11", "1_0", "0x8", "/", ".", "a\nb", "\0", "99999999999999999999", "PreActResNet34",
              "float16", "state.pth"]
    outcomes = []
    for _ in range(400):
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
    assert outcomes.count(0) > 16 and outcomes.count(2) > 160


def test_a_full_disk_leaves_the_old_checkpoint_and_no_part_of_a_new_one(tmp_path, call, small_dummy):
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
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (20_000, 100_000, 200_000):  # less than a checkpoint, wherever in it
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, allowed[1]))
        try:
            status, _, error = call("train_cifar.py", *flags, "--epochs=3", "--resume=auto", "--chkpt-steps=1")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
        assert status == 1 and error.count("\n") == 1 and ".pth: File too large" in error, error
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
    assert "no longer finite in epoch 1, step 2; no state was saved before: lower --lr-max" in error
    assert not list((tmp_path / "run").glob("*.pth"))
    assert call("train_cifar.py", *flags, "--epochs=1")[0] == 0
    good = (tmp_path / "run" / "state.pth").read_bytes()
    changed = [*flags, "--epochs=2", "--lr-max=1e30", "--allow-changes", "--resume=auto"]
    status, _, error = call("train_cifar.py", *changed)
    assert status == 1 and "in epoch 2, step" in error and "the last good state is" in error and "state.pth" in error
    assert (tmp_path / "run" / "state.pth").read_bytes() == good


@pytest.mark.parametrize("flags", [["--epochs=1"], ["--epochs=1", "--chkpt-steps=1"], ["--epochs=2", "--resume=auto"]])
def test_weights_that_the_last_step_blew_up_are_neither_saved_nor_reported(flags, tmp_path, call, small_dummy):
    """No loss or gradient tells of them any more."""
    one_step = [*SMALL, "--attack=fgsm", "--train-samples=32", "--chkpt-iters=1", "--fname", tmp_path / "run"]
    if "--resume=auto" in flags:
        assert call("train_cifar.py", *one_step, "--epochs=1")[0] == 0
    before = files(tmp_path / "run") if "--resume=auto" in flags else {}
    status, _, error = call("train_cifar.py", *one_step, *flags, "--lr-max=1e38", "--allow-changes")
    assert status == 1 and error.count("\n") == 1 and ", step 1; " in error, error
    after = files(tmp_path / "run")
    assert {name: content for name, content in after.items() if name.endswith(".pth")} == {
        name: content for name, content in before.items() if name.endswith(".pth")}
    assert "nan" not in after.get("metrics.jsonl", b"").decode().lower()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1"),
                                   RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
                                   RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
                                   RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
                                   RuntimeError("NCCL error: Cuda failure 2 'out of memory'")], ids=str)
def test_out_of_memory_names_the_flag_to_lower(error, tmp_path, call, evaluates, small_dummy, monkeypatch):
    def fail(*args):
        raise error

    for module, name, advice in (
            (robustness, "attack_steps", "the evaluation batch has 32 images: lower --batch-size below 32"),
            (train, "train_epoch", "lower --batch-size (now 32)"), (train, "build", NO_ROOM)):
        monkeypatch.setattr(module, name, fail)
        status, _, line = call("train_cifar.py", *SMALL, "--attack=fgsm", "--fname", tmp_path / "run")
        assert status == 1 and line.endswith(f": error: out of memory: {advice}\n")
    torch.save(PreActResNet18(base_width=4).state_dict(), tmp_path / "model.pth")
    for name, advice in (("attack_steps", "lower --batch-size (now 128)"), ("open_job", NO_ROOM)):
        monkeypatch.setattr(evaluation, name, fail)
        status, _, line = evaluates(tmp_path / "model.pth", "--data-set=cifar10", "--dummy", "--base-width=4",
                                 "--device=cpu")
        assert status == 1 and line.endswith(f": error: out of memory: {advice}\n")


class Command:
    """Pickled, a call of a function."""

    def __init__(self, *command):
        self.command = command

    def __reduce__(self):
        return self.command[0], self.command[1:]


def test_what_is_refused_for_safety_is_told_by_its_type(tmp_path, call, small_dummy):
    """Neither is it loaded, nor an older checkpoint in its place."""
    flags = [*TINY, "--fname", tmp_path / "run"]
    assert call("train_cifar.py", *flags, "--epochs=1")[0] == 0
    path, made = tmp_path / "run" / "state.pth", tmp_path / "made"
    content = torch.load(path, weights_only=True)
    for command, named in ((Command(os.system, f"touch {made}"), "contains posix.system"),
                           (Command(eval, f"open('{made}', 'w')"), "contains eval"),
                           (torch.nn.Linear(1, 1), "contains torch.nn.modules.linear.Linear"),
                           (np.array([None]), "contains numpy.dtypes.ObjectDType")):
        for new in (True, False):
            torch.save({**content, "more": command}, path, _use_new_zipfile_serialization=new)
            one_line(call("train_cifar.py", *flags, "--resume=auto"), f"{named}, which could run code of its own")
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps({"more": Command(os.system, f"touch {made}")}, protocol))
        one_line(call("train_cifar.py", *flags, "--resume=auto"), "which could run code of its own")
    assert not made.exists()


@pytest.mark.parametrize("new", [True, False])
def test_plain_values_beside_the_weights_are_read(new, tmp_path):
    values = {"args": argparse.Namespace(epochs=1, out=Path("runs")), "more": types.SimpleNamespace(a=[1]),
              "accuracy": [kind(1) for kind in (np.float32, np.float64, np.int64, np.bool_)], "losses": np.arange(3)}
    torch.save(values, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    read = read_checkpoint(tmp_path / "x.pth")
    assert str(read.pop("args").out) == "runs" and read.pop("losses").tolist() == [0, 1, 2]
    assert read == {name: values[name] for name in read}


@pytest.mark.parametrize("content, named", [
    (b"\x14\0\0\0\0\0\0\0{\"a\":{\"dtype\":\"F32\"", "is a safetensors file that was truncated or altered"),
    (b"\n<!DOCTYPE html>", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    (b"", "is truncated, altered or not a")])
def test_a_file_of_another_kind_is_named(content, named, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UsageError, match=f"x.pth {named}"):
        read_checkpoint(tmp_path / "x.pth")


def test_a_torchscript_program_is_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"x.pth is a TorchScript program: save the state dict of torch.jit.load"):
        read_checkpoint(tmp_path / "x.pth")


def test_without_a_folder_for_temporary_files_tmpdir_is_named(tmp_path, call, monkeypatch):
    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    one_line(call("train_cifar.py", *SMALL, "--fname", tmp_path / "run"), "TMPDIR")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_flushed_is_trained_in_all_the_same(tmp_path, call, monkeypatch):
    """Shared ones may answer EINVAL where a directory is to be flushed. A file that cannot be is an error, and told."""
    fsync, files_too = os.fsync, False

    def fail(descriptor):
        if files_too or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    flags = [*TINY, "--epochs=1", "--fname", tmp_path / "run"]
    assert call("train_cifar.py", *flags)[0] == 0
    files_too = True
    status, _, error = call("train_cifar.py", *flags)
    assert status == 1 and error.count("\n") == 1 and "Invalid argument" in error and "lower" not in error


def test_hashes_that_name_things_are_not_those_of_security(tmp_path, call, monkeypatch):
    """Where a machine forbids MD5 for security, a data set's files are still recognized by it."""
    md5 = hashlib.md5

    def forbidden(data=b"", *, usedforsecurity=True):
        if usedforsecurity:
            raise ValueError("disabled for FIPS")
        return md5(data, usedforsecurity=False)

    write_cifar10(tmp_path / "data", monkeypatch)
    monkeypatch.setattr(hashlib, "md5", forbidden)
    flags = [flag for flag in TINY if flag != "--dummy"]
    assert call("train_cifar.py", *flags, "--data-dir", tmp_path / "data", "--fname", tmp_path / "run")[0] == 0


def test_a_slow_precision_is_measured_and_not_looked_up(monkeypatch):
    assert 0.01 < slowdown(torch.bfloat16) < 1000
    monkeypatch.setattr("time.perf_counter", iter([0, 1, 1, 2, 2, 3, 3, 10, 10, 18, 18, 27]).__next__)
    assert slowdown(torch.bfloat16) == 7  # the shortest of three against the shortest of three


@pytest.mark.parametrize("times", [10, 30])
def test_a_surer_network_does_not_look_more_robust(times):
    """Its logits scaled up change no decision; in float32 and float16 the plain loss's gradient then vanishes."""
    torch.manual_seed(0)
    args = options.parse(DATASETS["train_cifar.py"], argv=["--base-width=8", "--device=cpu"])
    model = train.new_network(DATASETS["train_cifar.py"], args).eval()
    images = Images(torch.randint(256, (96, 32, 32, 3), dtype=torch.uint8), torch.zeros(96, dtype=torch.long))
    with torch.no_grad():
        model.linear.weight.mul_(300)
    images.labels = model(images.batch(slice(None))[0]).argmax(dim=1)
    found = []
    for scale in (1, times):
        with torch.no_grad():
            model.linear.weight.mul_(scale), model.linear.bias.mul_(scale)
        attack = robustness.PGD(1.5 / 255, 0.5 / 255, 10, 1)
        found.append(evaluated(model, images, attack, 32, Precision(args, torch.device("cpu"))))
    plain, sure = (verdict.metrics() for verdict in found)
    assert 0.05 < plain["robust_acc"] < 0.95 and sure["no_gradient"] == 0
    assert sure["robust_acc"] == pytest.approx(plain["robust_acc"], abs=0.06)
