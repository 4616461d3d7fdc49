"""Runs that go on: the same bits as a run never stopped, from every place a run can go on from."""
import errno
import fcntl
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SMALL, assert_same, assert_same_run, epochs_of, interrupt, one_line
from processes import Started, forked

from singlestep import options, train
from singlestep.run import state as states
from singlestep.run.console import UsageError
from singlestep.run.distributed import Stop
from singlestep.run.folder import Folder, add_evaluation, lock

pytestmark = pytest.mark.usefixtures("shallow")
THREE = [*SMALL, "--epochs=3", "--chkpt-iters=1", "--lr-schedule=cyclic", "--lr-max=0.1", "--attack=fgsm"]
ATTACK_FLAGS = ["--attack=fgsm", "--attack=fgsm --fgsm-init=zero", "--attack=zerograd --zero-qval=0.7 --zero-iters=2",
                "--attack=multigrad", "--attack=multigrad --multi-parallel --multi-th=2", "--attack=pgd --pgd-iters=2",
                "--attack=fgsm --amp --amp-dtype=float16"]


def evaluations_of(folder) -> list[dict]:
    return json.loads((folder / "evaluation.json").read_text())


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("attack", ATTACK_FLAGS)
def test_resume_n_and_auto_end_with_the_bits_of_an_unbroken_run(attack, tmp_path, call, small_dummy, monkeypatch):
    flags = [*THREE, *attack.split()]
    whole = tmp_path / "whole"
    assert call("train_cifar100.py", *flags, "--fname", whole)[0] == 0
    for n in (1, 2):
        part = tmp_path / f"from_{n}"
        part.mkdir()
        for name in (f"model_{n - 1}.pth", f"opt_{n - 1}.pth", "model_best.pth"):
            shutil.copy(whole / name, part)
        assert call("train_cifar100.py", *flags, "--fname", part, "--resume", n)[0] == 0
        assert_same_run(part, whole)
    part, done = tmp_path / "stopped", 0
    for at in (2, 3, 7):  # inside the first epoch, at its end, inside the third
        with monkeypatch.context() as patch:
            interrupt(patch, at - done)
            status, _, error = call("train_cifar100.py", *flags, "--fname", part, "--resume", "auto")
        assert status == 128 + signal.SIGTERM and error.count("\n") == 1 and "--resume auto" in error
        done = at
    status, output, _ = call("train_cifar100.py", *flags, "--fname", part, "--resume", "auto")
    assert status == 0 and "# resumed after 2 epochs and 1 step, from" in output
    assert [line.split(", from ")[0] for line in (part / "output.log").read_text().splitlines() if line[0] == "#"] == [
        f"# resumed after {done}" for done in ("0 epochs and 2 steps", "0 epochs and 3 steps", "2 epochs and 1 step")]
    assert_same_run(part, whole)


def test_svhn_goes_on_with_its_best_score(tmp_path, call, small_dummy, monkeypatch):
    assert call("train_svhn.py", *THREE, "--fname", tmp_path / "whole")[0] == 0
    interrupt(monkeypatch, 5)
    assert call("train_svhn.py", *THREE, "--fname", tmp_path / "part")[0] == 128 + signal.SIGTERM
    assert call("train_svhn.py", *THREE, "--fname", tmp_path / "part", "--resume=auto")[0] == 0
    assert_same_run(tmp_path / "part", tmp_path / "whole")


def test_svhn_goes_on_where_its_best_model_is_missing_or_of_an_abandoned_epoch(tmp_path, call, small_dummy):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert call("train_svhn.py", *THREE, "--fname", whole)[0] == 0
    part.mkdir()
    for name in ("model_1.pth", "opt_1.pth"):
        shutil.copy(whole / name, part)
    two = [*THREE, "--epochs=2", "--allow-changes", "--fname", part, "--resume=2"]
    assert call("train_svhn.py", *two)[0] == 0
    assert json.loads((part / "final.json").read_text())["model"] == "last"
    best = max(record["epoch"] for record in epochs_of(whole) if record["best"])
    changed = [*THREE, "--lr-max=0.001", "--allow-changes", "--fname", whole, f"--resume={best or 1}"]
    assert call("train_svhn.py", *changed)[0] == 0
    assert (whole / "earlier_1" / "model_best.pth").exists() == (best > 0)
    assert (whole / "model_best.pth").exists()


def test_a_run_does_not_go_on_with_another_data_set(tmp_path, call, small_dummy):
    assert call("train_cifar.py", *SMALL, "--fname", tmp_path / "run")[0] == 0
    for more in ([], ["--eval"], ["--allow-changes"]):
        one_line(call("train_svhn.py", *SMALL, "--fname", tmp_path / "run", "--resume=2", *more), "CIFAR-10")


def test_a_refused_resume_names_the_flag_that_the_user_changed(tmp_path, call, small_dummy):
    flags = [*SMALL, "--epochs=1", "--attack=fgsm", "--final-iters=0", "--fname", tmp_path / "run"]
    assert call("train_cifar.py", *flags)[0] == 0
    one_line(call("train_cifar.py", *flags, "--epsilon=16", "--resume=auto"), "has --epsilon 8.0, not 16.0")


@pytest.mark.parametrize("before, now, named", [
    ("--epsilon=16", "", "epsilon"), ("--attack=nfgsm --epsilon=4", "--attack=nfgsm --batch-size=64", "batch_size"),
    ("--attack=ckpt", "--attack=nfgsm", "attack"), ("", "--gradalign-lambda=3 --lr-max=0.2", "lr_max"),
    ("", "--gradalign-lambda=3", "gradalign_lambda"), ("--elle-adaptive", "", "elle_adaptive")])
def test_given_flags_are_named_first_and_derived_defaults_last(before, now, named):
    flags, args = (options.parse(options.CIFAR10, argv=each.split()) for each in (before, now))
    assert args.changed(flags.flags(), "fixed")[0] == named


def test_evaluating_leaves_alone_what_a_run_is_writing(tmp_path, call, small_dummy):
    folder = tmp_path / "run"
    assert call("train_cifar.py", *SMALL, "--fname", folder)[0] == 0
    others = (".evaluation.json.123.part", ".eval.log.123.part", "..autoattack-8.json.123.part",
              ".curves.png.123.part")
    for name in (".state.pth.123.part", ".model_best.pth.123.part", *others):
        (folder / name).write_bytes(b"half")
    assert call("train_cifar.py", *SMALL, "--fname", folder, "--resume=auto", "--eval")[0] == 0
    assert (folder / ".state.pth.123.part").exists()
    assert call("train_cifar.py", *SMALL, "--fname", folder)[0] == 0
    # Nor does a run touch what an evaluation or a plot is writing.
    assert sorted(path.name for path in folder.glob("*.part")) == sorted(others)


def test_a_run_stopped_in_an_evaluation_goes_on(tmp_path, call, small_dummy, monkeypatch):
    assert call("train_cifar.py", *THREE, "--fname", tmp_path / "whole")[0] == 0
    part, flags = tmp_path / "part", [*THREE, "--fname", tmp_path / "part", "--resume=auto"]
    # After the first epoch, after the last (two attacks with two checks each an epoch), in the final evaluation.
    for at in (1, 9, 5):
        together, count = Stop.together, 0

        def spy(stop, together=together, at=at):
            nonlocal count
            count += sys._getframe(1).f_code.co_name == "shown"
            if count == at:
                stop.signals.received = signal.SIGINT
            together(stop)

        with monkeypatch.context() as patch:
            patch.setattr(Stop, "together", spy)
            assert call("train_cifar.py", *flags)[0] == 128 + signal.SIGINT
    assert call("train_cifar.py", *flags)[0] == 0
    assert_same_run(part, tmp_path / "whole")
    starts = json.loads((part / "args.json").read_text())["starts"]
    assert [(start["epoch"], start["step"]) for start in starts] == [(0, 0), (0, 3), (2, 3), (3, 0)]


def test_auto_starts_where_there_is_nothing_and_is_done_where_all_is_there(tmp_path, call, small_dummy):
    flags = [*THREE, "--fname", tmp_path / "run", "--resume=auto"]
    assert call("train_cifar.py", *flags)[0] == 0
    before = files(tmp_path / "run")
    status, output, _ = call("train_cifar.py", *flags)
    assert status == 0 and "complete" in output
    assert files(tmp_path / "run") == before
    for lost in ("output.log", "metrics.jsonl", "final.json"):  # by a kill before they were written
        (tmp_path / "run" / lost).unlink()
    (tmp_path / "run" / ".final.json.123.part").write_text("{")
    assert call("train_cifar.py", *flags)[0] == 0
    assert files(tmp_path / "run") == before
    status, output, _ = call("train_cifar.py", *flags, "--final-iters=3")
    assert status == 0 and "PGD-3-2" in output and len(epochs_of(tmp_path / "run")) == 3


def test_auto_falls_back_to_the_newest_complete_pair(tmp_path, call, small_dummy, first_is_best):
    for name in ("whole", "part"):
        assert call("train_cifar.py", *THREE, "--fname", tmp_path / name)[0] == 0
    part = tmp_path / "part"
    for damaged in ("state.pth", "opt_2.pth"):
        (part / damaged).write_bytes((part / damaged).read_bytes()[:-1000])
    (part / "model_1.pth").unlink()
    status, output, _ = call("train_cifar.py", *THREE, "--fname", part, "--resume=auto")
    assert status == 0 and "resumed after 1 epoch, from" in output
    assert "model_0.pth and opt_0.pth, because state.pth is damaged" in output
    assert_same_run(part, tmp_path / "whole")
    aside = {path.name for path in (part / "earlier_1").iterdir()}
    assert aside >= {"state.pth", "model_2.pth", "opt_1.pth", "opt_2.pth", "final.json", "output.log"}
    for path in part.glob("*.pth"):
        path.write_bytes(b"not a checkpoint")
    one_line(call("train_cifar.py", *THREE, "--fname", part, "--resume=auto"), "state.pth")


def test_a_final_evaluation_is_that_of_its_epoch(tmp_path, call, small_dummy):
    """A run cut back to an earlier epoch is not complete because the longer one was."""
    folder, flags = tmp_path / "run", [*THREE, "--fname", tmp_path / "run"]
    assert call("train_cifar.py", *flags)[0] == 0
    status, output, _ = call("train_cifar.py", *flags, "--resume=2", "--epochs=2", "--allow-changes")
    assert status == 0 and "PGD-2-2" in output and "complete" not in output
    assert json.loads((folder / "final.json").read_text())["epoch"] == 1
    assert json.loads((folder / "earlier_1" / "final.json").read_text())["epoch"] == 2


def test_an_evaluation_asks_for_the_network_alone(tmp_path, call, small_dummy, monkeypatch):
    """Not for the optimizer's file, nor for the flags that say which images a step is on."""
    whole, lone = tmp_path / "whole", tmp_path / "lone"
    with monkeypatch.context() as patch:
        interrupt(patch, at=5)  # in the second epoch
        assert call("train_cifar.py", *THREE, "--fname", whole)[0] == 143
    evaluate = ["--eval", "--resume=auto", "--fname", whole]
    for more in ((), ("--batch-size=16",), ("--train-samples=40", "--seed=1")):
        assert call("train_cifar.py", *THREE, *evaluate, *more)[0] == 0
        assert evaluations_of(whole)[-1]["epoch"] == evaluations_of(whole)[-1]["final"]["epoch"] == 1
    lone.mkdir()
    shutil.copy(whole / "model_0.pth", lone)
    assert call("train_cifar.py", *THREE, "--eval", "--resume=1", "--fname", lone)[0] == 0
    assert evaluations_of(lone)[-1]["epoch"] == 0
    one_line(call("train_cifar.py", *THREE, "--resume=1", "--fname", lone), "opt_0.pth")


def test_other_images_begin_the_epoch_anew(tmp_path, call, small_dummy, monkeypatch):
    flags = [*THREE, "--fname", tmp_path / "run"]
    with monkeypatch.context() as patch:
        interrupt(patch, at=5)  # in the second epoch
        assert call("train_cifar.py", *flags)[0] == 143
    load = train.load
    monkeypatch.setattr(train, "load", lambda dataset, args: load(dataset, replace(args, dummy=True)))
    flags = [flag for flag in flags if flag != "--dummy"]
    status, output, _ = call("train_cifar.py", *flags, "--resume=auto", "--allow-changes")
    assert status == 0 and "resumed after 1 epoch, from" in output


def test_a_checkpoint_is_compared_before_data_are_looked_for(tmp_path, call, small_dummy):
    assert call("train_cifar.py", *THREE, "--fname", tmp_path / "run")[0] == 0
    flags = [flag for flag in THREE if flag != "--dummy"]
    one_line(call("train_cifar.py", *flags, "--base-width=5", "--resume=auto", "--data-dir", tmp_path / "none",
                  "--fname", tmp_path / "run"), "architecture")


def test_resume_n_keeps_what_later_epochs_left(tmp_path, call, small_dummy):
    folder = tmp_path / "run"
    assert call("train_cifar.py", *THREE, "--fname", folder)[0] == 0
    log = (folder / "output.log").read_text()
    model = (folder / "model_2.pth").read_bytes()
    flags = [*THREE, "--lr-max=0.2", "--allow-changes", "--fname", folder, "--resume=1"]
    status, output, _ = call("train_cifar.py", *flags)
    assert status == 0 and "earlier_1" in output
    assert (folder / "earlier_1" / "output.log").read_text() == log
    assert (folder / "earlier_1" / "model_2.pth").read_bytes() == model
    assert [record["epoch"] for record in epochs_of(folder)] == [0, 1, 2]
    assert (folder / "model_2.pth").read_bytes() != model


@pytest.mark.parametrize("change, named", [("--lr-max=0.3", "--lr-max"), ("--zero-qval=0.2", "--zero-qval"),
                                           ("--seed=9", "--seed"), ("--batch-size=16", "--batch-size"),
                                           ("--epsilon=4 --gradalign-lambda=0.2", "--epsilon")])
def test_a_run_does_not_go_on_with_other_flags_unless_told_to(change, named, tmp_path, call, small_dummy):
    folder = tmp_path / "run"
    assert call("train_cifar.py", *THREE, "--epochs=3", "--fname", folder)[0] == 0
    before = files(folder)
    flags = [*THREE, *change.split(), "--fname", folder, "--resume=2"]
    one_line(call("train_cifar.py", *flags), named)
    assert files(folder) == before
    assert call("train_cifar.py", *flags, "--allow-changes")[0] == 0


def test_a_best_by_another_measure_gives_way_and_is_kept_beside(tmp_path, call, small_dummy, monkeypatch):
    folder, measure, scores = tmp_path / "run", train.measure, [0.9, 0.1]
    monkeypatch.setattr(train, "measure", lambda run: {**measure(run), "score": scores.pop(0)})
    assert call("train_cifar.py", *THREE, "--epochs=1", "--fname", folder)[0] == 0
    before = (folder / "model_best.pth").read_bytes()
    flags = [*THREE, "--epochs=2", "--epsilon=40", "--val-size=16", "--allow-changes", "--resume=auto"]
    assert call("train_cifar.py", *flags, "--fname", folder)[0] == 0
    first, second = epochs_of(folder)
    assert first["best"] and second["best"]
    assert (folder / "earlier_1" / "model_best.pth").read_bytes() == before
    heads, *lines = (line.split("\t") for line in (folder / "output.log").read_text().splitlines() if line[0] != "#")
    assert len(heads) == len(lines[0]) == len(lines[1]) and lines[0][heads.index("Val Robust Acc")] == "nan"


@pytest.mark.parametrize("damage", ["missing model", "missing opt", "cut model", "cut opt", "empty", "text", "list",
                                    "width", "classes", "pickle", "optimizer"])
def test_a_checkpoint_that_does_not_fit_is_named(damage, tmp_path, call, small_dummy):
    folder = tmp_path / "run"
    assert call("train_cifar.py", *SMALL, "--chkpt-iters=1", "--fname", folder)[0] == 0
    model, opt = folder / "model_0.pth", folder / "opt_0.pth"
    flags, script_name, named = [], "train_cifar.py", "model_0.pth"
    if damage == "missing model":
        model.unlink()
    elif damage == "missing opt":
        opt.unlink()
        named = "opt_0.pth"
    elif damage == "cut model":
        model.write_bytes(model.read_bytes()[:-500])
    elif damage == "cut opt":
        opt.write_bytes(opt.read_bytes()[: len(opt.read_bytes()) // 2])
        named = "opt_0.pth"
    elif damage == "empty":
        model.write_bytes(b"")
    elif damage == "text":
        model.write_text("weights")
    elif damage == "list":
        torch.save([1, 2], model)
    elif damage == "width":
        flags = ["--base-width=8"]
    elif damage == "classes":
        script_name = "train_cifar100.py"
    elif damage == "pickle":
        model.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    elif damage == "optimizer":
        torch.save({"state": {0: 1}, "param_groups": []}, opt)
        named = "opt_0.pth"
    before = files(folder)
    one_line(call(script_name, *SMALL, *flags, "--fname", folder, "--resume=1"), named)
    assert files(folder) == before and not (tmp_path / "owned").exists()


def test_a_state_that_makes_no_sense_is_named(tmp_path, call, small_dummy):
    folder = tmp_path / "run"
    assert call("train_cifar.py", *SMALL, "--epochs=1", "--fname", folder)[0] == 0
    for pair in ("model_0.pth", "opt_0.pth"):
        (folder / pair).unlink()
    whole = torch.load(folder / "state.pth", weights_only=True)
    model, opt = whole["model"], whole["opt"]
    for state in ({"model": model | {"conv1.weight": torch.full((4, 3, 3, 3), math.inf)}, "opt": opt},
                  {"model": model | {"conv1.weight": None}, "opt": opt}, {"model": model, "opt": None}, {},
                  {"model": model, "opt": opt | {"state": {0: {"momentum_buffer": None}}}},
                  {"model": model, "opt": opt | {"state": {0: {"momentum_buffer": torch.zeros(1)}}}},
                  {"model": model, "opt": {"run": opt["run"]}}):
        torch.save(state, folder / "state.pth")
        one_line(call("train_cifar.py", *SMALL, "--allow-changes", "--fname", folder, "--resume=auto"), "state.pth")


def test_how_the_optimizer_steps_is_the_command_lines_and_never_the_files(tmp_path, call, small_dummy):
    """Strange options in a file, and a momentum buffer whose values all share one place in memory."""
    folder = tmp_path / "run"
    assert call("train_cifar.py", *THREE, "--fname", folder)[0] == 0
    whole = torch.load(folder / "model_2.pth", weights_only=True)
    optimizer = torch.load(folder / "opt_1.pth", weights_only=True)
    optimizer["param_groups"][0] |= dict(momentum="x", maximize=True, dampening=None, nesterov=True, weight_decay=9.0)
    torch.save(optimizer, folder / "opt_1.pth")
    assert call("train_cifar.py", *THREE, "--fname", folder, "--resume=2")[0] == 0
    assert_same(torch.load(folder / "model_2.pth", weights_only=True), whole)
    optimizer["state"][0]["momentum_buffer"] = torch.zeros(1).expand(optimizer["state"][0]["momentum_buffer"].shape)
    torch.save(optimizer, folder / "opt_1.pth")
    assert call("train_cifar.py", *THREE, "--fname", folder, "--resume=2")[0] == 0


def test_momentum_of_another_memory_layout_is_that_of_the_same_weights(tmp_path, call, small_dummy):
    """As files have it that were written by a network in PyTorch's default layout; ours of this width is not in it."""
    flags = [*THREE, "--base-width=16", "--epochs=2", "--train-samples=32", "--final-samples=1"]
    assert call("train_cifar.py", *flags, "--fname", tmp_path / "run")[0] == 0
    whole = torch.load(tmp_path / "run" / "model_1.pth", weights_only=True)
    assert not whole["layer1.0.conv1.weight"].is_contiguous()
    optimizer = torch.load(tmp_path / "run" / "opt_0.pth", weights_only=True)
    for buffers in optimizer["state"].values():
        buffers["momentum_buffer"] = buffers["momentum_buffer"].contiguous()
    torch.save(optimizer, tmp_path / "run" / "opt_0.pth")
    assert call("train_cifar.py", *flags, "--fname", tmp_path / "run", "--resume=1")[0] == 0
    assert_same(torch.load(tmp_path / "run" / "model_1.pth", weights_only=True), whole)


def test_the_state_is_saved_every_so_many_steps_and_at_the_end_of_an_epoch(tmp_path, call, small_dummy, monkeypatch):
    saved, save_state = [], states.save_state

    def spy(folder, state, *rest):
        saved.append((state.epoch, state.step))
        save_state(folder, state, *rest)

    monkeypatch.setattr(states, "save_state", spy)
    flags = [*SMALL, "--attack=fgsm", "--batch-size=16", "--chkpt-steps=2"]  # five steps an epoch
    assert call("train_cifar.py", *flags, "--fname", tmp_path / "run")[0] == 0
    assert saved == [(0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0), (2, 0)]  # the last with the final evaluation


def test_the_best_model_is_never_one_of_an_epoch_that_was_made_again(tmp_path, call, small_dummy):
    """auto goes back to epoch 1; what was best in the epochs that it leaves behind is not what the run has now."""
    folder = tmp_path / "run"
    assert call("train_cifar.py", *THREE, "--lr-max=0.02", "--fname", folder)[0] == 0
    records = epochs_of(folder)
    records[-1]["best"] = True
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shutil.copy(folder / "model_2.pth", folder / "model_best.pth")
    abandoned = (folder / "model_best.pth").read_bytes()
    for damaged in ("state.pth", "opt_2.pth", "opt_1.pth"):
        (folder / damaged).write_bytes(b"cut")
    flags = [*THREE, "--lr-max=1", "--allow-changes", "--resume=auto", "--fname", folder]
    assert call("train_cifar.py", *flags)[0] == 0
    assert (folder / "model_best.pth").read_bytes() != abandoned
    best = [record["epoch"] for record in epochs_of(folder) if record["best"]][-1]
    assert best > 0
    assert_same(*(torch.load(folder / f"model_{which}.pth", weights_only=True) for which in (best, "best")))
    lines = [line.split("\t")[0] for line in (folder / "earlier_1" / "output.log").read_text().splitlines()]
    assert lines[1:4] == ["0", "1", "2"]  # more than the line of one epoch was cut off


def test_the_folder_is_locked_before_it_is_read(tmp_path, call, small_dummy, monkeypatch):
    """Else, a run that ends in between would be taken for one that never was."""
    folder = tmp_path / "run"
    folder.mkdir()
    one_line(call("train_cifar.py", *SMALL, "--fname", folder, "--val-size=96"), "--val-size")
    assert not list(folder.iterdir())  # there was nothing to read
    (folder / ".lock").touch()  # as a run that is beginning has it
    find, refused = states.find_checkpoint, []

    def spy(*args):
        with pytest.raises(UsageError, match="in use"):
            Folder(folder).lock()
        refused.append(True)
        return find(*args)

    monkeypatch.setattr(states, "find_checkpoint", spy)
    assert call("train_cifar.py", *SMALL, "--fname", folder, "--resume=auto")[0] == 0 and refused
    free = Folder(folder)
    free.lock()
    free.release()


def test_log_lines_that_are_cut_off_are_kept_beside_even_where_no_other_file_is(tmp_path, call, small_dummy):
    folder = tmp_path / "run"
    assert call("train_cifar.py", *THREE, "--fname", folder)[0] == 0
    for name in ("final.json", "state.pth", "model_best.pth", "model_1.pth", "opt_1.pth", "model_2.pth", "opt_2.pth"):
        (folder / name).unlink()
    log = (folder / "output.log").read_text()
    assert call("train_cifar.py", *THREE, "--fname", folder, "--resume=1")[0] == 0
    assert (folder / "earlier_1" / "output.log").read_text() == log


def test_an_evaluation_with_other_columns_has_a_header_of_its_own(tmp_path, call, small_dummy):
    flags = [*SMALL, "--fname", tmp_path / "run"]
    assert call("train_cifar.py", *flags)[0] == 0
    for _ in range(3):
        assert call("train_cifar.py", *flags, "--eval", "--resume=auto")[0] == 0
    older = {**evaluations_of(tmp_path / "run")[0], "val_robust_acc": 0.5}  # such as versions before this one wrote
    add_evaluation(Folder(tmp_path / "run"), older)
    rows = [line.split("\t") for line in (tmp_path / "run" / "eval.log").read_text().splitlines()]
    assert [(row[0], len(row)) for row in rows if not row[0].startswith("PGD")] == [
        ("Epoch", 12), ("1", 12), ("1", 12), ("1", 12), ("Epoch", 13), ("1", 13)]


def test_evaluations_beside_one_another_are_all_kept(tmp_path):
    """Also where each process has a folder of its own for temporary files."""
    (tmp_path / "program.py").write_text("""
import sys
from singlestep.run.folder import TITLES, Folder, add_evaluation
record = {title.lower().replace(" ", "_"): 0.0 for title in TITLES}
names = "iters", "seconds", "clean_loss", "clean_acc", "robust_loss", "robust_acc"
record["final"] = dict.fromkeys(names, 0.0)
for i in range(15):
    add_evaluation(Folder(sys.argv[1]), {**record, "epoch": int(sys.argv[2]) + i})
""")
    processes = []
    for first in ("0", "100"):
        (tmp_path / first).mkdir()
        processes.append(Started(tmp_path / "program.py", tmp_path, first,
                                 env={**os.environ, "TMPDIR": str(tmp_path / first)}))
    assert [process.finish(timeout=100).returncode for process in processes] == [0, 0]
    assert sorted(record["epoch"] for record in evaluations_of(tmp_path)) == [*range(15), *range(100, 115)]
    header, *lines = (tmp_path / "eval.log").read_text().splitlines()
    assert header.startswith("Epoch") and len(lines) == 60


def test_a_network_alone_is_evaluated_and_named(tmp_path, call, small_dummy):
    flags = [*THREE, "--epochs=1"]
    assert call("train_cifar.py", *flags, "--fname", tmp_path / "whole")[0] == 0
    final = json.loads((tmp_path / "whole" / "final.json").read_text())
    for name in ("model_0.pth", "model_best.pth"):
        lone = tmp_path / name[:-4]
        lone.mkdir()
        shutil.copy(tmp_path / "whole" / name, lone)
        assert call("train_cifar.py", *flags, "--eval", "--resume=auto", "--fname", lone)[0] == 0
        found, = evaluations_of(lone)
        assert found["file"] == str(lone / name) and found["final"]["robust_loss"] == final["robust_loss"]


def test_a_state_of_an_older_format_is_refused(tmp_path, call, small_dummy):
    flags = [*SMALL, "--epochs=1", "--resume=auto", "--fname", tmp_path / "run"]
    assert call("train_cifar.py", *flags)[0] == 0
    state = torch.load(tmp_path / "run" / "state.pth", weights_only=True)
    del state["opt"]["run"]["history"]
    torch.save(state, tmp_path / "run" / "state.pth")
    before = files(tmp_path / "run")
    one_line(call("train_cifar.py", *flags, "--epochs=2"), "state.pth is of an older version")
    assert files(tmp_path / "run") == before


def test_a_damaged_log_is_written_anew_from_the_state(tmp_path, call, small_dummy, first_is_best):
    whole, part, flags = tmp_path / "whole", tmp_path / "part", [*THREE, "--epochs=2", "--fname"]
    assert call("train_cifar.py", *flags, whole)[0] == 0
    damages = (("metrics.jsonl", "{"), ("metrics.jsonl", "[1]"), ("metrics.jsonl", '{"epoch": "x", "best": true}'),
               ("args.json", "[]"), ("final.json", ""), ("output.log", ""))
    for name, text in damages:
        shutil.copytree(whole, part)
        (part / name).write_text(text)
        assert call("train_cifar.py", *flags, part, "--resume=auto", "--final-iters=3")[0] == 0
        assert epochs_of(part) == epochs_of(whole) and (part / name).stat().st_size > 2
        (part / name).write_text(text)
        assert call("train_cifar.py", *flags, part, "--resume=1")[0] == 0
        if name == "metrics.jsonl":  # of which epoch the best model was, is not known any more
            assert (part / "earlier_2" / "model_best.pth").exists() and (part / "model_best.pth").exists()
        else:
            assert_same_run(part, whole)
        shutil.rmtree(part)


def publish(whole, part, epoch: int, score: float, numpy_name: str) -> None:
    """Into a new folder `part`, what the published scripts would have left after the epoch.

    Keys under `module.`, as DataParallel leaves them, a best model with its score, and a bare state of the optimizer,
    the learning rate in it a NumPy scalar.
    """
    part.mkdir()
    model, optimizer = (torch.load(whole / f"{name}_{epoch}.pth", weights_only=True) for name in ("model", "opt"))
    model = {f"module.{key}": value for key, value in model.items()}
    torch.save(model, part / f"model_{epoch}.pth")
    torch.save({"state_dict": model, "test_robust_acc": score, "test_robust_loss": 2.0, "test_loss": 1.0,
                "test_acc": 0.5}, part / "model_best.pth")
    group = {**optimizer["param_groups"][0], "lr": np.float64(0.05)}
    path = part / f"opt_{epoch}.pth"
    torch.save({"state": optimizer["state"], "param_groups": [group]}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            assert not name.endswith("data.pkl") or b"core.multiarray\n" in content
            archive.writestr(name, content.replace(b"cnumpy._core.multiarray\n", f"c{numpy_name}\n".encode()))


@pytest.mark.parametrize("numpy_name, score", [("numpy._core.multiarray", 0.99), ("numpy.core.multiarray", 0.0)])
def test_published_files_go_on_with_the_score_of_their_best_model(numpy_name, score, tmp_path, call, small_dummy):
    whole, part = tmp_path / "whole", tmp_path / "part"
    flags = [*THREE, "--fname"]
    assert call("train_cifar.py", *flags, whole)[0] == 0
    publish(whole, part, 1, score, numpy_name)
    best = (part / "model_best.pth").read_bytes()
    assert call("train_cifar.py", *flags, part, "--resume=2", "--final-model=best")[0] == 0
    assert_same(*(torch.load(folder / "model_2.pth", weights_only=True) for folder in (whole, part)))
    record, = epochs_of(part)
    found = torch.load(part / "state.pth", weights_only=True)["opt"]["run"]
    assert record["epoch"] == 2 and record["best"] == (record["test_robust_acc"] > score)
    assert found["best"] == max(score, record["test_robust_acc"]) and found["final"]["model"] == "best"
    assert ((part / "model_best.pth").read_bytes() == best) != record["best"]
    assert call("train_cifar.py", *flags, part, "--resume=2", "--eval")[0] == 0


def test_an_optimizer_that_is_no_match_is_told_of_and_one_that_never_stepped_is_taken(tmp_path, call, small_dummy):
    flags = [*SMALL, "--attack=fgsm", "--epochs=1", "--fname", tmp_path / "run"]
    assert call("train_cifar.py", *flags)[0] == 0
    path = tmp_path / "run" / "opt_0.pth"
    group, = torch.load(path, weights_only=True)["param_groups"]
    two = [{**group, "params": [0]}, {**group, "params": group["params"][1:]}]
    torch.save({"state": {}, "param_groups": two}, path)
    one_line(call("train_cifar.py", *flags, "--epochs=2", "--resume=1"), "opt_0.pth has 2 parameter groups")
    torch.save({"state": {}, "param_groups": [group]}, path)
    assert call("train_cifar.py", *flags, "--epochs=2", "--resume=1")[0] == 0
    assert [record["epoch"] for record in epochs_of(tmp_path / "run")] == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_real_signal_saves_the_state_first(number, tmp_path):
    run = Started("train_cifar.py", *SMALL, "--attack=fgsm", "--epochs=300", "--fname", tmp_path / "run")
    run.wait_for(tmp_path / "run" / "metrics.jsonl")
    run.send_signal(number)
    done = run.finish(timeout=60)
    assert done.returncode == 128 + number
    assert done.stderr == f"train_cifar.py: stopped by {number.name}; --resume auto continues from here\n"
    progress = torch.load(tmp_path / "run" / "state.pth", weights_only=True)["opt"]["run"]
    assert (progress["epoch"], progress["step"]) > (0, 0)
    assert len(epochs_of(tmp_path / "run")) == progress["epoch"]


def test_signal_handlers_are_put_back_and_an_ignored_sighup_stays_ignored(tmp_path, call, small_dummy, monkeypatch):
    """As under nohup; and a program may call main again and again."""
    flags = [*SMALL, "--attack=fgsm", "--resume=auto", "--fname", tmp_path / "run"]
    numbers, seen = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), []
    train_epoch = train.train_epoch

    def spy(run, after_step):
        os.kill(os.getpid(), sends)
        seen.append([signal.getsignal(number) == run.signals._note for number in numbers])
        return train_epoch(run, after_step)

    monkeypatch.setattr(train, "train_epoch", spy)
    given = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may be run under nohup
    before = [signal.getsignal(number) for number in numbers]
    sends = signal.SIGHUP
    status, _, error = call("train_cifar.py", *flags)
    assert status == 128 + signal.SIGHUP and error.endswith(": stopped by SIGHUP; --resume auto continues from here\n")
    saved = torch.load(tmp_path / "run" / "state.pth", weights_only=True)["opt"]["run"]
    assert (saved["epoch"], saved["step"]) == (0, 1)
    assert [signal.getsignal(number) for number in numbers] == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert call("train_cifar.py", *flags)[0] == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, given)
    assert seen == [[True, True, False], [True, True, False], [True, True, False]]  # obeyed once: a second one kills


def test_a_thread_can_train_too(tmp_path, call, small_dummy):
    ended = []
    thread = threading.Thread(target=lambda: ended.append(call("train_cifar.py", *SMALL, "--fname", tmp_path / "run")))
    thread.start()
    thread.join()
    assert ended[0][0] == 0 and ended[0][2] == "" and len(epochs_of(tmp_path / "run")) == 2


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_the_bits_of_an_unbroken_one(tmp_path):
    """SIGKILL, again and again at moments that differ from day to day; each run that gets through is compared."""
    flags = [*SMALL, "--epochs=4", "--chkpt-iters=2", "--chkpt-steps=2", "--batch-size=16", "--train-samples=96",
             "--attack=zerograd", "--lr-schedule=cyclic", "--test-iters=1", "--final-samples=16", "--resume=auto"]
    forked("train_cifar.py", "--help")  # or the first process's wait for PyTorch would count
    began = time.monotonic()
    assert forked("train_cifar.py", *flags, "--fname", tmp_path / "whole").returncode == 0
    whole = time.monotonic() - began
    kills = finished = 0
    while kills < 20 or not finished:
        run = Started("train_cifar.py", *flags, "--fname", tmp_path / f"part_{finished}")
        run.process.join(random.uniform(0, 0.6) * whole if kills < 20 else 280)  # the last run is left alone
        if run.running:
            run.send_signal(signal.SIGKILL)
            kills += run.finish().returncode == -signal.SIGKILL
            continue
        done = run.finish()
        assert done.returncode == 0, done.stderr
        finished += 1
    for i in range(finished):
        part = tmp_path / f"part_{i}"
        assert_same_run(part, tmp_path / "whole")
        assert [record["epoch"] for record in epochs_of(part)] == [0, 1, 2, 3] and not list(part.glob(".*.part"))
    assert any("# resumed" in (tmp_path / f"part_{i}" / "output.log").read_text() for i in range(finished))


def test_a_folder_is_for_one_run_at_a_time(tmp_path, call, small_dummy):
    folder = tmp_path / "run"
    assert call("train_cifar.py", *SMALL, "--fname", folder)[0] == 0
    before = files(folder)
    other = Folder(folder)
    other.lock()
    for flags in ([], ["--resume=auto"], ["--resume=2"]):
        one_line(call("train_cifar.py", *SMALL, "--fname", folder, *flags), "is in use by another run")
    assert call("train_cifar.py", *SMALL, "--fname", folder, "--eval", "--resume=2")[0] == 0
    other.release()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if "eval" not in path.name} == before


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_file_locks_a_warning_is_printed_and_all_continues(number, tmp_path, call, evaluates, small_dummy,
                                                                   monkeypatch):
    def fail(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    run = tmp_path / "run"
    warning = f"warning: {run} is on a file system without file locks: two runs in this folder could overwrite each " \
              f"other's files\n"
    for flags in ([], ["--resume=auto"], ["--eval", "--resume=auto"]):
        status, _, error = call("train_cifar.py", *SMALL, "--fname", run, *flags)
        assert (status, error) == (0, "" if flags else warning)
    assert evaluates(run, "--attacks=clean", "--device=cpu", "--again")[0] == 0
    assert len(json.loads((run / "evaluation.json").read_text())) == 2


def test_no_evaluation_waits_for_a_lock_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "monotonic", itertools.count(0, 6).__next__)
    with lock(tmp_path / ".evaluation.lock"):
        add_evaluation(Folder(tmp_path), {"attacks": []})
    assert (tmp_path / "evaluation.json").exists()


def test_another_final_evaluation_leaves_the_first_one_to_be_read(tmp_path, call, small_dummy):
    folder = tmp_path / "run"
    flags = [*SMALL, "--attack=fgsm", "--fname", folder]
    assert call("train_cifar.py", *flags)[0] == 0
    for number, more in enumerate((["--final-model=best", "--final-iters=3"], ["--epochs=3", "--allow-changes"]), 1):
        before = {name: (folder / name).read_bytes() for name in ("final.json", "output.log")}
        assert call("train_cifar.py", *flags, "--resume=auto", *more)[0] == 0
        assert {name: (folder / f"earlier_{number}" / name).read_bytes() for name in before} == before
        final = json.loads((folder / "final.json").read_text())
        assert (final["model"], final["iters"], final["epoch"]) == (("best", 3, 1), ("last", 2, 2))[number - 1]
        assert final["epoch"] == epochs_of(folder)[-1]["epoch"]
        assert (folder / "output.log").read_text().count("PGD") == 1


NEW_FLAGS = ("momentum", "momentum_low", "weight_decay", "pad_mode", "rotate", "attack_smoothing", "ckpt_mode",
             "depth", "no_final_norm", "norm")


def flags_of_an_older_version(dataset, *flags: str) -> dict:
    """The flags that a run recorded before it had these, whose methods and recipes set other defaults."""
    recorded = options.parse(dataset, argv=list(flags)).flags()
    return {name: value for name, value in recorded.items() if name not in NEW_FLAGS}


@pytest.mark.parametrize("dataset, command, former", [
    (options.SVHN, "--method=n-fgsm --epsilon=12", dict(eps_warmup=0.0, lr_max=0.01, noise_k=2.0)),
    (options.SVHN, "--method=free", dict(lr_max=0.01)), (options.CIFAR10, "--method=ckpt", dict(ckpt_mode="train")),
    (options.CIFAR100, "--recipe=fastat --method=fgsm-rs", dict(
        lr_schedule="onecycle", pad_mode=None, rotate=None, attack_smoothing=0.0, momentum=0.95, momentum_low=0.85)),
    (options.CIFAR10, "--method=sora", {})])
def test_a_run_of_an_older_version_keeps_its_defaults(dataset, command, former):
    """Unless the user gives others; a run of today, and one by another name, keep nothing."""
    before = flags_of_an_older_version(dataset, *command.split()) | {
        name: value for name, value in former.items() if name not in NEW_FLAGS}
    args = options.parse(dataset, argv=command.split())
    today = args.flags()
    notes = args.keep_defaults(before)
    assert args.flags() == {**today, "ckpt_mode": "train", **former} and args.changed(before, "fixed") == []
    assert len(notes) == sum(today[name] != value for name, value in former.items())
    given = options.parse(dataset, argv=[*command.split(), "--lr-max=0.3", "--ckpt-mode=eval"])
    given.keep_defaults(before)
    assert (given.lr_max, given.ckpt_mode) == (0.3, "eval")
    for other in (today, {**before, "method": "pgd"}, {}):
        args = options.parse(dataset, argv=command.split())
        assert args.keep_defaults(other) == [] and args.flags() == today


def test_a_run_of_an_older_version_is_continued_as_it_began(tmp_path, call, small_dummy, monkeypatch):
    """With the same command, and to the bit."""
    flags = [*SMALL, "--epochs=3", "--chkpt-iters=1", "--method=n-fgsm"]
    was = ["--eps-warmup=0", "--lr-max=0.01"]
    assert call("train_svhn.py", *flags, *was, "--fname", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt(patch, at=4)
        assert call("train_svhn.py", *flags, *was, "--fname", tmp_path / "part")[0] == 143
    saved = torch.load(tmp_path / "part" / "state.pth", weights_only=True)
    for name in NEW_FLAGS:
        del saved["opt"]["run"]["args"][name]
    torch.save(saved, tmp_path / "part" / "state.pth")
    status, output, error = call("train_svhn.py", *flags, "--fname", tmp_path / "part", "--resume=auto")
    assert status == 0 and "--lr-max=0.01, as in the version that started the run" in output, error
    assert_same_run(tmp_path / "part", tmp_path / "whole")


def test_a_run_of_an_older_version_is_not_continued_in_another_norm(tmp_path, call, small_dummy):
    """Though its flags do not say in which norm it began."""
    flags = [*SMALL, "--method=fgsm", "--epochs=1", "--fname", tmp_path / "run"]
    assert call("train_cifar.py", *flags)[0] == 0
    saved = torch.load(tmp_path / "run" / "state.pth", weights_only=True)
    del saved["opt"]["run"]["args"]["norm"], saved["opt"]["run"]["args"]["ckpt_mode"]
    torch.save(saved, tmp_path / "run" / "state.pth")
    one_line(call("train_cifar.py", *flags, "--norm=l_2", "--epsilon=8", "--resume=auto"), "has --norm l_inf, not l_2")
    assert call("train_cifar.py", *flags, "--resume=auto")[0] == 0
