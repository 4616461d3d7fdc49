"""The scripts as a user runs them: the paper's commands, the files they leave, and every bad input."""
import argparse
import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    DATASETS,
    ROOT,
    SIDE,
    SMALL,
    TINY,
    SmallNet,
    assert_same_run,
    epochs_of,
    one_line,
    script,
    write_cifar10,
    write_svhn,
)
from processes import forked

from singlestep import attacks, collapse, data, networks, options, robustness, train
from singlestep.networks import PreActResNet18
from singlestep.options import FLAGS
from singlestep.run import device
from singlestep.run import state as states
from singlestep.run.console import UsageError
from singlestep.run.device import Precision

# Each script's defaults as published.
PUBLISHED = {
    "train_cifar.py": dict(data_dir="../cifar-data", epochs=52, lr_schedule="onedrop", lr_max=0.1, zero_qval=0.35,
                           fname="cifar_model"),
    "train_cifar100.py": dict(data_dir="../cifar100-data", epochs=52, lr_schedule="onedrop", lr_max=0.1, zero_qval=0.45,
                              fname="cifar100_model"),
    "train_svhn.py": dict(data_dir="../svhn-data", epochs=15, lr_schedule="cyclic", lr_max=0.01, zero_qval=0.7,
                          fname="svhn_model"),
    "train_tiny.py": dict(data_dir="../tiny-imagenet-data", epochs=30, lr_schedule="cyclic", lr_max=0.2, zero_qval=0.35,
                          fname="tiny_model"),
}
COMMON = dict(model="PreActResNet18", batch_size=128, lr_drop=50, attack="multigrad", epsilon=8, pgd_alpha=2,
              fgsm_alpha=2, multi_samps=3, multi_th=-1, multi_parallel=False, zero_iters=1, fgsm_init="random", seed=0,
              width_factor=10, full_test=False, test_iters=10, test_restarts=1, resume=0, eval=False, chkpt_iters=10,
              device="auto", base_width=64, depth=34, pgd_iters=10, train_samples=None, val_size=0, final_iters=50,
              final_restarts=10, final_samples=None, amp=False, amp_dtype="bfloat16", amp_impl="native", dummy=False,
              objective="ce", tf32=True, compile=False, deterministic=False, sync_bn=False)
MEANS = {"train_cifar.py": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
         "train_cifar100.py": ((0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
                               (0.2673342858792401, 0.2564384629170883, 0.27615047132568404)),
         "train_svhn.py": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
         "train_tiny.py": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}


def paper_commands() -> list[str]:
    """As the scripts' own help has them; the README has those of CIFAR-10, each with a folder."""
    commands = [command for name in DATASETS for command in
                re.findall(r"^ *python (train_\w+\.py --epochs=.*)$", (ROOT / name).read_text(), re.MULTILINE)]
    readme = (ROOT / "README.md").read_text()
    shown = re.findall(r"^python (train_\w+\.py --epochs=.*) --fname=\S+$", readme, re.MULTILINE)
    assert shown == commands[:2]
    return commands


@pytest.mark.parametrize("name", DATASETS)
def test_defaults_are_the_published_ones(name):
    args = options.parse(DATASETS[name], argv=[]).flags()
    for flag, value in {**COMMON, **PUBLISHED[name]}.items():
        assert args[flag] == value, flag
    assert (DATASETS[name].mean, DATASETS[name].std) == MEANS[name]


@pytest.mark.parametrize("name", DATASETS)
def test_help_names_every_flag_in_groups_with_its_default(name):
    done = script(name, "--help", env={**os.environ, "COLUMNS": "10000"})
    assert done.returncode == 0 and not done.stderr and DATASETS[name].name in done.stdout
    for flag, value in {**COMMON, **PUBLISHED[name]}.items():
        entry, = re.findall(rf"^  --{flag.replace('_', '-')}[ ,\n].*?(?=^  -|^\S|\Z)", done.stdout, re.M | re.S)
        told = re.findall(r"\(default: (.*?)\)", entry)
        if value is None or value is False:
            assert told in ([], ["all"]), entry
        else:
            assert len(told) == 1 and (told[0].startswith(str(value)) or float(told[0]) == value), entry
    for group in ("data:", "model:", "training:", "attack to train on:", "evaluation:", "files:", "machine:"):
        assert group in done.stdout


@pytest.mark.parametrize("flag", ["--help", "--zero-qval=7", "--multi-th=4"])
def test_the_command_line_answers_without_pytorch(flag):
    program = f"""if True:
        import sys, train_cifar
        try:
            train_cifar.parse(train_cifar.CIFAR10, train_cifar.__doc__, ["{flag}"])
        except SystemExit as end:
            print(end.code, "torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == ("0 False" if flag == "--help" else "2 False"), done.stderr


def test_torchvision_and_the_compiler_wait_until_they_are_needed():
    """Importing them takes as long as PyTorch itself."""
    program = ("import sys, plot, train_cifar; from singlestep import data, evaluation; "
               "data.load_test('cifar10', synthetic=True); "
               "print({'torchvision', 'torch._dynamo'} & sys.modules.keys())")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("i", range(6))
def test_the_papers_commands_run_to_the_end(i, tmp_path):
    commands = paper_commands()
    assert len(commands) == 6
    name, *flags = shlex.split(commands[i])
    done = forked(name, *flags, *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / PUBLISHED[name]["fname"]
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "args.json", "final.json", "metrics.jsonl", "model_1.pth", "model_best.pth", "model_healthy.pth",
        "opt_1.pth", "output.log", "state.pth"]
    header, *lines, last = (folder / "output.log").read_text().splitlines()
    titles = ["Epoch", "Train Time", "Test Time", "LR", "Train Robust Loss", "Train Robust Acc", "Test Loss",
              "Test Acc", "Test Robust Loss", "Test Robust Acc"]
    titles += ["Val Robust Acc"] * (name == "train_svhn.py") + ["Defence Mean", "Attack Mean"]
    assert header.split("\t") == titles and len(lines) == 2
    shown = [line.split()[0] for line in done.stdout.splitlines() if line[0] != "#"]
    assert shown == ["method", "data", "network", "folder", "1/2", "2/2", "final"] and not done.stderr
    assert re.fullmatch(r"PGD2\ttime: [\d.]+\tclean loss: [\d.]+\tclean acc: [\d.]+\trobust loss: [\d.]+\trobust acc: "
                        r"[\d.]+", last)
    for epoch, (line, record) in enumerate(zip(lines, epochs_of(folder), strict=True)):
        cells = dict(zip(titles, line.split("\t"), strict=True))
        assert int(cells["Epoch"]) == record["epoch"] == epoch
        for title in titles[1:]:
            assert float(cells[title]) == pytest.approx(record[title.lower().replace(" ", "_")], abs=0.06)
        assert record["train_images"] == 80 and 0 < record["defence_mean"] <= 8.0001
    svhn = name == "train_svhn.py"
    assert [record["test_images"] for record in epochs_of(folder)] == [64, 64]
    assert [record.get("val_images") for record in epochs_of(folder)] == ([2, 2] if svhn else [None, None])
    network = PreActResNet18(base_width=4, num_classes=DATASETS[name].classes)
    network.load_state_dict(torch.load(folder / "model_1.pth", weights_only=True))
    network.load_state_dict(torch.load(folder / "model_best.pth", weights_only=True))
    final = json.loads((folder / "final.json").read_text())
    assert final["images"] == 48 and final["model"] == ("best" if svhn else "last")
    assert json.loads((folder / "args.json").read_text())["args"]["attack"] in " ".join(flags)


def test_an_epoch_is_judged_on_the_first_images_and_the_last_one_or_every_one_on_all(tmp_path, call, small_dummy,
                                                                                    monkeypatch):
    evaluated, steps = [], robustness.attack_steps
    monkeypatch.setattr(robustness, "attack_steps", lambda model, images, *rest: (
        evaluated.append(images), steps(model, images, *rest))[1])
    for flags, sizes in ([], [40, 40, 64]), (["--full-test"], [64, 64, 64]):
        evaluated.clear()
        assert call("train_cifar.py", *SMALL, *flags, "--epochs=3", "--test-samples=40", "--fname",
                    tmp_path / str(flags))[0] == 0
        assert [record["test_images"] for record in epochs_of(tmp_path / str(flags))] == sizes
        _, test = data.dummy(10)
        for images, size in zip(evaluated, [*(size for size in sizes for _ in ("PGD", "FGSM")), 48], strict=True):
            assert torch.equal(images.pixels, test.pixels[:size]) and torch.equal(images.labels, test.labels[:size])


def test_dummy_images_are_learnt(tmp_path, call, small_dummy, monkeypatch):
    """With this epsilon, each of four seeds ended with 98% or more, and with 90% or more under PGD."""
    monkeypatch.setattr(data, "DUMMY_SIZES", {True: 768, False: 64})
    flags = [*SMALL, "--train-samples=768", "--base-width=8", "--epochs=4", "--lr-schedule=cyclic", "--lr-max=0.2",
             "--attack=zerograd", "--epsilon=2", "--test-iters=1", "--final-iters=5"]
    status, _, _ = call("train_cifar.py", *flags, "--fname", tmp_path / "run")
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    assert status == 0 and final["clean_acc"] > 0.8 and 0.4 < final["robust_acc"] <= final["clean_acc"]


@pytest.mark.parametrize("flags, named", [
    ("--zero-qval=1.5", "--zero-qval"), ("--zero-qval=-0.1", "--zero-qval"), ("--zero-qval=nan", "--zero-qval"),
    ("--zero-qval=much", "--zero-qval"), ("--multi-samps=0", "--multi-samps"), ("--multi-samps=1.5", "--multi-samps"),
    ("--multi-th=4", "--multi-th"), ("--multi-th=0", "--multi-th"), ("--multi-samps=5 --multi-th=6", "--multi-th"),
    ("--attack=zerograd --multi-th=5", "--multi-th"),
    ("--multi-th=-2", "--multi-th"), ("--epsilon=-1", "--epsilon"), ("--epsilon=inf", "--epsilon"),
    ("--fgsm-alpha=-1", "--fgsm-alpha"), ("--pgd-alpha=-0.5", "--pgd-alpha"), ("--epochs=0", "--epochs"),
    ("--batch-size=0", "--batch-size"), ("--batch-size=-5", "--batch-size"), ("--model=ResNet", "--model"),
    ("--attack=cw", "--attack"), ("--lr-max=-1", "--lr-max"), ("--lr-schedule=flat", "--lr-schedule"),
    ("--fgsm-init=ones", "--fgsm-init"), ("--device=abacus", "--device"), ("--device=cuda:99", "--device"),
    ("--device=cpu:3", "--device"), ("--train-samples=0", "--train-samples"), ("--seed=-1", "--seed"),
    ("--train-samples=99999999", "--train-samples"), ("--val-size=99999999", "--val-size"),
    ("--val-size=2040 --train-samples=9", "--train-samples"), ("--resume=5", "--resume"), ("--eval", "--resume"),
    ("--resume=1", "model_0.pth"), ("--resume=last", "--resume"),
    ("--eval --resume=auto", "--fname"), ("--amp --amp-impl=apex", "--amp-impl native"), ("--sync-bn", "--sync-bn"),
    ("--compile", "--base-width"),
    ("--amp --amp-dtype=int8", "--amp-dtype"), ("--zero-iters=0", "--zero-iters"), ("--chkpt-iters=0", "--chkpt-iters"),
    ("--no-such-flag", "--no-such-flag"), ("--final-restarts=0", "--final-restarts"),
    ("--base-width=0", "--base-width"), ("--width-factor=9999", "--width-factor"),
    ("--depth=30", "--depth"), ("--depth=4", "--depth"),
    ("--objective=hinge", "--objective"), ("--data-dir=", "--data-dir"), ("--fname=", "--fname"), ("--lr", "--lr"),
    ("--zero-qval -- 0.5", "--zero-qval"), ("--epochs=99999999999999999999", "--epochs"), ("stray", "stray"),
    ("--final-iters=99999999999999999999", "--final-iters"), ("--final-restarts", "one argument"),
])
def test_a_bad_flag_gives_one_line_and_touches_nothing(flags, named, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = flags.split()
    kept = [flag for flag in SMALL if flag.split("=")[0] not in {flag.split("=")[0] for flag in given}]
    one_line(call("train_cifar.py", *kept, *given), named)
    assert not list(tmp_path.iterdir())


def test_a_bad_flag_gives_one_line_from_the_shell_too(tmp_path):
    done = script("train_svhn.py", "--zero-qval=7", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and not list(tmp_path.iterdir())
    assert done.stderr == "train_svhn.py: error: argument --zero-qval: must be a number, from 0 to 1, not 7\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path, call, small_dummy):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("long" * 100)):
        one_line(call("train_cifar.py", *SMALL, "--fname", place), str(place))
    assert (tmp_path / "file").read_text() == "mine"


def test_data_that_is_missing_cut_short_or_altered_is_named(tmp_path, call, monkeypatch):
    small = ["--base-width=4", "--batch-size=4", "--train-samples=8", "--epochs=1", "--test-iters=1", "--final-iters=1",
             "--final-restarts=1", "--device=cpu", "--data-dir", tmp_path / "data"]
    folder, _ = write_cifar10(tmp_path / "data", monkeypatch)
    assert call("train_cifar.py", *small, "--fname", tmp_path / "good")[0] == 0
    whole = (folder / "data_batch_3").read_bytes()
    for damaged in (whole[:-100], b"", whole[:500] + b"x" + whole[501:], b"cos\nsystem\n(S'touch owned'\ntR."):
        (folder / "data_batch_3").write_bytes(damaged)
        one_line(call("train_cifar.py", *small, "--fname", tmp_path / "bad"), "data_batch_3")
    (folder / "data_batch_3").unlink()
    one_line(call("train_cifar.py", *small, "--fname", tmp_path / "bad"), "data_batch_3")
    assert not (tmp_path / "bad").exists()


def test_svhn_trains_from_its_files_and_a_damaged_one_is_named(tmp_path, call, monkeypatch):
    small = ["--base-width=4", "--batch-size=4", "--epochs=1", "--test-iters=1", "--final-iters=1",
             "--final-restarts=1", "--device=cpu", "--data-dir", tmp_path / "data"]
    write_svhn(tmp_path / "data", monkeypatch)
    assert call("train_svhn.py", *small, "--fname", tmp_path / "good")[0] == 0
    path = tmp_path / "data" / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-50])
    one_line(call("train_svhn.py", *small, "--fname", tmp_path / "bad"), "test_32x32.mat")
    assert not (tmp_path / "bad").exists()


def test_data_that_cannot_be_downloaded_is_one_line(tmp_path, call, monkeypatch):
    import torchvision.datasets.utils as downloads
    from torchvision.datasets import cifar

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    for module in (downloads, cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", offline)
    one_line(call("train_cifar.py", "--data-dir", tmp_path / "no/ne", "--fname", tmp_path / "run"), "--data-dir")
    assert not list(tmp_path.iterdir())


def test_apex_is_used_as_its_o1_where_it_still_is(monkeypatch):
    args, cuda = SimpleNamespace(amp=True, amp_dtype="float16", amp_impl="apex", tf32=True), torch.device("cuda")
    with pytest.raises(UsageError, match="--amp-impl native"):
        Precision(args, cuda)
    calls = []
    amp = SimpleNamespace(
        initialize=lambda *parts, **options: calls.append((parts, options)),
        disable_casts=lambda: (calls.append("float32"), contextlib.nullcontext())[1],
        scale_loss=lambda loss, optimizer: (calls.append("scaled"), contextlib.nullcontext(loss * 2))[1],
        state_dict=lambda: {"loss_scaler0": 1}, load_state_dict=calls.append)
    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace(amp=amp))
    model = SmallNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    precision = Precision(args, cuda)
    precision.prepare(model, optimizer)
    assert calls.pop()[0] == (model, optimizer) and not calls
    with precision.autocast():
        assert not torch.is_autocast_enabled("cuda")
    before = model.linear.bias.detach().clone()
    assert precision.backward_and_step(model(torch.rand(2, 3, 4, 4)).square().sum(), optimizer)
    assert calls.pop() == "scaled" and not torch.equal(model.linear.bias, before)
    precision.float32_logits(model, torch.rand(2, 3, 4, 4))
    precision.load_state_dict(precision.state_dict())
    assert calls == ["float32", {"loss_scaler0": 1}]
    args.amp_dtype = "bfloat16"
    with pytest.raises(UsageError, match="--amp-dtype float16"):
        Precision(args, cuda)


def test_a_fresh_start_sets_an_earlier_run_aside(tmp_path, call, small_dummy):
    folder = tmp_path / "run"
    call("train_cifar.py", *SMALL, "--fname", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    (folder / "notes.txt").write_text("mine")
    status, output, _ = call("train_cifar.py", *SMALL, "--attack=fgsm", "--fname", folder)
    assert status == 0 and "earlier_1" in output
    assert {path.name: path.read_bytes() for path in (folder / "earlier_1").iterdir()} == before
    assert (folder / "notes.txt").read_text() == "mine" and len(epochs_of(folder)) == 2
    call("train_cifar.py", *SMALL, "--fname", folder)
    assert_same_run(folder, folder / "earlier_1")
    assert (folder / "earlier_2").is_dir()


def test_a_machine_without_git_trains_too(tmp_path, call, small_dummy, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert call("train_cifar.py", *SMALL, "--fname", tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["starts"][0]["commit"] is None


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path, call, small_dummy):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        flags = [*SMALL, "--attack=zerograd", "--seed", seed, "--fname", tmp_path / name]
        assert call("train_cifar100.py", *flags)[0] == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert epochs_of(tmp_path / "a")[0]["train_robust_loss"] != epochs_of(tmp_path / "c")[0]["train_robust_loss"]


def test_val_size_chooses_the_best_checkpoint_on_images_never_trained_on(tmp_path, call, small_dummy, monkeypatch):
    evaluated, steps = [], robustness.attack_steps
    monkeypatch.setattr(robustness, "attack_steps", lambda model, images, *rest: (
        evaluated.append(images), steps(model, images, *rest))[1])
    flags = [flag for flag in SMALL if not flag.startswith("--train-samples")]
    status, output, _ = call("train_cifar.py", *flags, "--val-size=24", "--fname", tmp_path / "run")
    assert status == 0 and "24 validation and" in output and len(re.findall(r"^\d/2  .*  val ", output, re.M)) == 2
    assert "Val Robust Acc" in (tmp_path / "run" / "output.log").read_text().splitlines()[0]
    assert torch.equal(evaluated[2].pixels, data.dummy(10)[0].pixels[-24:])  # after PGD and FGSM on test images
    first, second = epochs_of(tmp_path / "run")
    assert first["val_images"] == second["val_images"] == 24 and first["train_images"] == 72
    assert second["best"] == (second["val_robust_acc"] > first["val_robust_acc"])


def test_eval_writes_its_own_logs_keeps_them_all_and_changes_nothing_else(tmp_path, call, small_dummy):
    for name in ("train_cifar.py", "train_svhn.py"):
        folder = tmp_path / name
        call(name, *SMALL, "--fname", folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        status, output, error = call(name, *SMALL, "--fname", folder, "--eval", "--resume=2")
        assert (status, error) == (0, "")
        header, line, last = (folder / "eval.log").read_text().splitlines()
        assert [shown.split()[1] for shown in output.splitlines() if shown.startswith("| ")] == [
            "attack", "clean", "fgsm", "pgd-2-1", "pgd-2-2"]
        cells = dict(zip(header.split("\t"), line.split("\t"), strict=True))
        assert cells["Epoch"] == "1" and cells["LR"] == "nan" and last.startswith("PGD2\t")
        trained = epochs_of(folder)[1]
        assert float(cells["Test Acc"]) == pytest.approx(trained["test_acc"], abs=1e-4)
        assert float(cells["Test Robust Acc"]) == pytest.approx(trained["test_robust_acc"], abs=1e-4)
        evaluation, = json.loads((folder / "evaluation.json").read_text())
        assert evaluation["file"] == str(folder / "model_1.pth") and evaluation["final"]["epoch"] == 1
        for key, value in json.loads(before["final.json"]).items():
            assert key in ("seconds", *collapse.summary([])) or evaluation["final"][key] == value
        status, output, _ = call(name, *SMALL, "--fname", folder, "--eval", "--resume=auto", "--final-iters=1")
        kept = (folder / "eval.log").read_text().splitlines()
        assert status == 0 and kept[:3] == [header, line, last] and kept[4].startswith("PGD1\t") and len(kept) == 5
        assert json.loads((folder / "evaluation.json").read_text())[0] == evaluation
        for path in folder.iterdir():
            if path.name not in ("eval.log", "evaluation.json", ".evaluation.lock"):
                assert path.read_bytes() == before[path.name]


def test_a_precision_that_is_slower_here_is_told_of(tmp_path, call, small_dummy, monkeypatch):
    flags = [*SMALL, "--epochs=1", "--fname", tmp_path / "run"]
    for factor, told in ((1.1, False), (7.0, True)):
        monkeypatch.setattr(device, "slowdown", lambda dtype, factor=factor: factor)
        assert ("bfloat16 is 7.0 times as slow as float32" in call("train_cifar.py", *flags, "--amp")[1]) == told
    assert "times as slow" not in call("train_cifar.py", *flags)[1]


@pytest.mark.parametrize("links", [True, False])
def test_a_network_is_written_once_and_later_ones_leave_it(links, tmp_path, call, first_is_best, small_dummy,
                                                           monkeypatch):
    written, save = [], states.save
    monkeypatch.setattr(states, "save", lambda path, content: (written.append(path.name), save(path, content)))

    def no_links(source, path):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(collapse, "collapsed", lambda history: [False] * len(history))
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    assert call("train_cifar.py", *TINY, "--lr-max=0.1", "--fname", tmp_path)[0] == 0
    assert [name for name in written if name.startswith("model")] == ["model_healthy.pth", "model_healthy.pth"]
    first, last, best, healthy = (tmp_path / f"model_{name}.pth" for name in (0, 1, "best", "healthy"))
    assert first.read_bytes() == best.read_bytes() != last.read_bytes() == healthy.read_bytes()
    assert first.samefile(best) == last.samefile(healthy) == links
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("amp, dtype, supported, told", [
    (True, "bfloat16", False, True), (True, "bfloat16", True, False), (True, "float16", False, False),
    (False, "bfloat16", False, False)])
def test_a_gpu_without_bfloat16_is_told_of(amp, dtype, supported, told, monkeypatch):
    """As far as this can be seen without a GPU."""
    def native(including_emulation=True):
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", native)
    args = argparse.Namespace(amp=amp, amp_dtype=dtype)
    hints = device.precision_hints(args, torch.device("cuda"))
    assert hints == ["this GPU emulates bfloat16, which is slow: use --amp-dtype=float16"] * told


def test_peak_memory_is_that_of_each_phase(tmp_path, call, small_dummy, monkeypatch):
    """Training, evaluation, final evaluation: as on CUDA."""
    memory, cuda, phase = [5], torch.device("cuda"), device.peak_memory
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: max(memory))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: memory.clear())

    def as_on_cuda(name, device):
        memory.append({"train_memory": 3, "test_memory": 2, "memory": 1}[name])
        return phase(name, cuda)

    monkeypatch.setattr(train, "peak_memory", as_on_cuda)
    assert call("train_cifar.py", *SMALL, "--attack=fgsm", "--fname", tmp_path)[0] == 0
    assert [(each["train_memory"], each["test_memory"]) for each in epochs_of(tmp_path)] == [(5, 2), (3, 2)]
    assert json.loads((tmp_path / "final.json").read_text())["memory"] == 1
    assert phase("memory", torch.device("cpu")) == {}


@pytest.mark.parametrize("attack, batches", [("--attack=fgsm", 1), ("--attack=multigrad", 1),
                                             ("--attack=multigrad --multi-parallel", 3)])
def test_only_training_steps_on_whole_batches_are_compiled_each_for_one_size(attack, batches, tmp_path, call,
                                                                             small_dummy, monkeypatch):
    """One graph for several sizes rounds otherwise, and a run that goes on would not meet it when the unbroken does."""
    graphs, sizes, compile_function = [], set(), torch.compile

    def backend(graph, inputs):
        sizes.update(len(value) for value in inputs if getattr(value, "shape", ())[1:] == (3, SIDE, SIDE))
        graphs.append("for all" if any(isinstance(value, torch.SymInt) for value in inputs) else "for one")
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: compile_function(
        function, backend=backend, dynamic=dynamic))
    monkeypatch.setattr(networks, "PreActResNet18", lambda num_classes, **_: SmallNet(classes=num_classes))
    flags = [*SMALL, "--compile", *attack.split(), "--chkpt-steps=1", "--fname", tmp_path / "run"]
    assert call("train_cifar.py", *flags)[0] == 0
    assert graphs == ["for one"] * len(graphs) and 2 <= len(graphs) <= 3, graphs  # the attack's and the step's
    assert sizes == {32, 32 * batches}


def test_saving_the_state_waits_for_no_compiler(tmp_path, call, small_dummy, monkeypatch):
    """It may have to be done within seconds, and the compiler's own processes may have been stopped by the signal."""
    done, save = [], states.save_state

    def compile_function(function, mode, dynamic):
        return lambda x: (done.append(len(x)), function(x))[1]

    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr(states, "save_state", lambda *args: (done.append("saved"), save(*args)))
    flags = [*SMALL, "--compile", "--base-width=16", "--epochs=1", "--chkpt-steps=1", "--attack=fgsm"]
    assert call("train_cifar.py", *flags, "--fname", tmp_path / "run")[0] == 0
    assert done == [32, 32, "saved"] * 2 + ["saved"] * 3  # after the short batch, the epoch and the final evaluation


@pytest.mark.slow
def test_without_a_compiler_compile_ends_in_one_line(tmp_path):
    (tmp_path / "train_cifar.py").write_text(f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
from singlestep import options
from singlestep.options import FLAGS
from singlestep import train
from singlestep.options import FLAGS
from helpers import SmallNet
train.new_network = lambda dataset, args: SmallNet(classes=dataset.classes)
train.main(options.CIFAR10, options.parse(options.CIFAR10))
""")
    env = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = script(tmp_path / "train_cifar.py", *SMALL, "--compile", "--fname", tmp_path / "run", env=env)
    assert done.returncode == 1
    assert done.stderr.startswith("train_cifar.py: error: --compile: ") and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith("; use --no-compile\n")


@pytest.mark.parametrize("flags, told", [
    ("--zero-qval=0.9", "--zero-qval has no effect with --attack=multigrad"),
    ("--attack=zerograd --zero-qval=0.9", None), ("--attack=fgsm --multi-samps=5", "--multi-samps has no effect"),
    ("--width-factor=4", "--width-factor has no effect"), ("--depth=28", "--depth has no effect"),
    ("--method=pgi", None),
    ("--attack=fgsm --pgd-alpha=1", None), ("--attack=fgsm --pgd-step=1", "--pgd-step has no effect"),
    ("--attack=pgd --fgsm-alpha=1", "--fgsm-alpha has no effect"),
    ("--method=gradalign --gradalign-lambda=0.3", None), ("--gradalign-lambda=0.3", "--gradalign-lambda has no effect"),
    ("--attack=fgsm --norm=l_2", "--epsilon=8 means 8/255, a small radius for --norm=l_2"),
    ("--attack=none --norm=l_2 --epsilon=128", None), ("--norm=l_inf", None),
    ("--attack=fgsm --norm=l_2 --epsilon=0.5", "--epsilon=0.5 means 0.5/255: did you mean 128?"),
    ("--attack=fgsm --fgsm-alpha=0.0392", "--fgsm-alpha=0.0392 means 0.0392 epsilons: did you mean 1.25?"),
    ("--attack=fgsm --epsilon=0.031 --fgsm-alpha=0.039", "did you mean 1.26?"),
    ("--epsilon=0.031", "--epsilon=0.031 means 0.031/255: did you mean 7.9"), ("--epsilon=8/255", None)])
def test_what_has_no_effect_or_another_meaning_is_told(flags, told, tmp_path, call, small_dummy):
    status, output, _ = call("train_cifar.py", *SMALL, "--epochs=1", *flags.split(), "--fname", tmp_path / "run")
    assert status == 0 and (told in output if told else "has no effect" not in output and "mean" not in output)


def test_a_misspelt_flag_is_told_which_one_may_have_been_meant(tmp_path, call):
    one_line(call("train_cifar.py", "--epoch=3"), "did you mean --epochs?")
    one_line(call("train_cifar.py", "--xyzzy"), "unrecognized arguments: --xyzzy\n")


@pytest.mark.parametrize("flags, hint", [
    ("--eps=8", "did you mean --epsilon or --eps-warmup?"), ("--gpu 0", "did you mean --device?"),
    ("--alpha=2", "did you mean --fgsm-alpha or --pgd-alpha or --uap-alpha?"),
    ("--epsilons=8", "did you mean --epsilon?"),
    ("--lr=0.1", "did you mean --lr-schedule or --lr-max or --lr-drop?"), ("--no-compil", "did you mean --no-compile?"),
    ("--dampening=0", "arguments: --dampening=0\n"), ("--workers=2", "arguments: --workers=2\n"),
    ("--method=nfgsm", "did you mean --method=n-fgsm or --attack=nfgsm?"),
    ("--method=zerogad", "did you mean --method=zerograd?"), ("--method=ce", "did you mean --objective=ce?"),
    ("--attack=trades", "did you mean --method=trades or --objective=trades?"),
    ("--attack=n-fgsm", "did you mean --attack=nfgsm or --method=n-fgsm?"),
    ("--objective=fgsm", "did you mean --method=fgsm or --attack=fgsm?"),
    ("--model=resnet18", "did you mean --model=ResNet18?"), ("--lr-schedule=cosine", "onecycle-epoch, not cosine\n")])
def test_a_mistake_in_a_flag_or_its_value_gets_the_right_hint(flags, hint, call):
    one_line(call("train_cifar.py", *flags.split()), hint)


@pytest.mark.parametrize("flags, hint", [
    ({"gpu": 0}, "did you mean --device?"), ({"eps": 8}, "did you mean --epsilon or --eps-warmup?"),
    ({"attack": "trades"}, "did you mean --method=trades or --objective=trades?")])
def test_a_mistake_from_python_gets_the_same_hint(flags, hint):
    with pytest.raises(UsageError, match=re.escape(hint)):
        options.arguments(options.CIFAR10, flags)


@pytest.mark.parametrize("flags, told", [
    ("--lr-schedule=onedrop --lr-drop=50 --epochs=30", "the learning rate never drops: --lr-drop=50 is not below"),
    ("--epochs=30", "the learning rate never drops: --lr-drop=50 is not below --epochs=30"),
    ("--epochs=51", None), ("--lr-schedule=cyclic --lr-drop=9", "--lr-drop has no effect with --lr-schedule=cyclic"),
    ("--eps-warmup=20 --epochs=2 --lr-drop=1", "training ends at epsilon 0.8, and is evaluated at 8"),
    ("--eps-warmup=2 --epochs=3 --lr-drop=1", None),
    ("--eps-warmup=2 --attack=none", "--eps-warmup has no effect with --attack=none"),
    ("--eps-warmup=2 --attack=none --objective=elle --lr-drop=1", None),
    ("--amp-dtype=float16", "--amp-dtype has no effect without --amp"), ("--amp --amp-dtype=float16", None),
    ("--compile-mode=max-autotune", "--compile-mode has no effect without --compile"),
    ("--final-iters=0 --final-samples=9", "--final-samples has no effect with --final-iters=0"),
    ("--full-test --test-samples=9", "--test-samples has no effect with --full-test"),
    ("--dummy --data-dir=x", "--data-dir has no effect with --dummy")])
def test_flags_that_never_act_are_named(flags, told):
    lines = options.idle_flags(options.parse(options.CIFAR10, argv=flags.split()))
    assert len(lines) == bool(told) and (told or "") in "".join(lines)


def test_an_attack_in_the_wrong_unit_raises():
    with pytest.raises(ValueError, match="8/255, not 8"):
        attacks.fgsm(SmallNet(), torch.rand(2, 3, 5, 5), torch.zeros(2, dtype=torch.long), 8, 8)


@pytest.mark.parametrize("method, own, foreign", [
    ("zerograd", ["--zero-qval=0.35", "--fgsm-alpha=2", "--epsilon=8"], "--multi-samps"),
    ("pgd", ["--pgd-alpha=2", "--pgd-step", "--fgsm-init=random"], "--fgsm-alpha"),
    ("pgi", ["--logits-lambda=10", "--pgi-reset=40", "--label-smoothing=0.4444"], "--zero-qval"),
    ("free", ["--free-replays=8"], "--fgsm-alpha")])
def test_help_of_a_method_shows_its_flags_alone(method, own, foreign):
    done = script("train_cifar.py", f"--method={method}", "--help")
    assert done.returncode == 0 and not done.stderr
    assert all(f"\n  {flag}\n" in done.stdout for flag in own) and foreign not in done.stdout


def test_help_of_a_method_has_the_values_that_other_flags_give(call):
    status, output, error = call("train_svhn.py", "--help", "--method=elle", "--epsilon=16", "--recipe=paper")
    assert (status, error) == (0, "") and "\n  --elle-lambda=5000\n" in output and "\n  --epsilon=16\n" in output
    assert "\n  --epochs=15 --lr-schedule=cyclic --lr-max=0.01\n" in output
    one_line(call("train_svhn.py", "--help", "--method=elle", "--epsilon=x"), "--epsilon")


def args_json(path: Path, args: options.Args, **changes) -> Path:
    """The args.json of a run with these arguments."""
    flags = {name: value for name, value in args.flags().items() if name != "data_set"}
    path.write_text(json.dumps({"data_set": args.data_set, "statement": args.statement, "args": flags | changes}))
    return path


ELSEWHERE = ["--fname=runs/x", "--resume=3", "--quiet", "--chkpt-iters=1", "--device=cpu", "--amp", "--no-tf32",
             "--data-dir=/elsewhere"]


@pytest.mark.parametrize("dataset", [options.CIFAR10, options.SVHN], ids=lambda each: each.name)
@pytest.mark.parametrize("flags", [
    "", "--attack=fgsm", "--method=fgsm-rs --fgsm-alpha=2 --momentum=0.5 --seed=3", "--method=n-fgsm --recipe=fastat",
    "--method=n-fgsm --recipe=fastat --fgsm-alpha=2 --label-smoothing=0 --mean=0.5,0.5,0.5",
    "--method=elle --epsilon=4", "--attack=nfgsm --objective=aaer --aaer-lambdas=1,2,3 --epsilon=12",
    "--method=pgi --model=WideResNet --depth=28",
    "--method=free --epochs=7 --dummy --train-samples=50 --full-test --final-model=best --on-collapse=stop"])
def test_a_run_like_another_has_its_flags_but_for_those_of_files_and_machine(dataset, flags, tmp_path):
    args = options.parse(dataset, argv=[*flags.split(), *ELSEWHERE])
    again = options.parse(dataset, argv=[f"--like={args_json(tmp_path / 'of_a_colleague.json', args)}"])
    usual = options.parse(dataset, argv=[])
    for name, each in FLAGS.items():
        here = each.metadata["group"] in ("files", "machine") or name == "data_dir"
        if name != "like":
            assert getattr(again, name) == getattr(usual if here else args, name), name
    args_json(tmp_path / "args.json", args)
    assert options.parse(dataset, argv=[f"--like={tmp_path}"]).flags() == {**again.flags(), "like": str(tmp_path)}


@pytest.mark.parametrize("flags, beside, like", [
    ("--method=fgsm-rs --lr-max=0.05 --fgsm-alpha=1.5 --pgd-alpha=1", "--method=n-fgsm",
     "--method=n-fgsm --lr-max=0.05 --pgd-alpha=1"),
    ("--method=gradalign --seed=2 --base-width=16", "--method=fgsm-rs --seed=1",
     "--method=fgsm-rs --seed=1 --base-width=16"),
    ("--method=pgi --epochs=9", "--method=zerograd --zero-qval=0.7", "--method=zerograd --zero-qval=0.7 --epochs=9"),
    ("--method=n-fgsm --recipe=fastat", "--method=nuat", "--method=nuat --recipe=fastat"),
    ("--method=n-fgsm --epsilon=4", "--epsilon=16 --model=WideResNet",
     "--method=n-fgsm --epsilon=16 --model=WideResNet")])
def test_a_flag_and_a_method_beside_like_win(flags, beside, like, tmp_path):
    run = args_json(tmp_path / "args.json", options.parse(options.CIFAR10, argv=flags.split()))
    found = options.parse(options.CIFAR10, argv=[f"--like={run}", *beside.split()])
    assert found.flags() == {**options.parse(options.CIFAR10, argv=like.split()).flags(), "like": str(run)}


def test_a_new_method_keeps_the_norm_and_radius_of_the_run_that_it_is_like(tmp_path):
    run = args_json(tmp_path / "args.json", options.parse(options.CIFAR10, argv=[
        "--method=fgsm-rs", "--norm=l_2", "--epsilon=128", "--pgd-alpha=20", "--label-smoothing=0.1"]))
    args = options.parse(options.CIFAR10, argv=[f"--like={run}", "--method=sora"])
    assert (args.attack, args.norm, args.epsilon, args.pgd_alpha) == ("sora", "l_2", 128, 20)
    assert args.label_smoothing == 0
    with pytest.raises(SystemExit):
        options.parse(options.CIFAR10, argv=[f"--like={run}", "--method=zerograd"])


def test_on_another_data_set_a_run_like_another_has_the_defaults_of_that_one(tmp_path):
    run = args_json(tmp_path / "args.json", options.parse(options.CIFAR10, argv=["--method=n-fgsm", "--epsilon=4"]))
    found = options.parse(options.SVHN, argv=[f"--like={run}"])
    assert found.flags() == {**options.parse(options.SVHN, argv=["--method=n-fgsm", "--epsilon=4"]).flags(),
                             "like": str(run)}


def test_a_run_that_cannot_be_repeated_is_one_line(tmp_path, call, small_dummy):
    args = options.parse(options.CIFAR10, argv=SMALL)
    for changes, named in (({"epsilon": -1}, "args.json: --epsilon must be"), ({"attack": "x"}, "--attack must be one"),
                           ({"method": "gone"}, "--method must be one of"),
                           ({"model": "ResNet18", "shortcut": "raw"}, "args.json: --shortcut raw is for")):
        one_line(call("train_cifar.py", "--like", args_json(tmp_path / "args.json", args, **changes)), named)
    (tmp_path / "args.json").unlink()
    one_line(call("train_cifar.py", "--like", tmp_path), "it has no args.json")
    one_line(call("train_cifar.py", "--like", tmp_path / "nowhere"), "nowhere is missing")
    (tmp_path / "args.json").write_text("{")
    one_line(call("train_cifar.py", "--like", tmp_path), "args.json is damaged")
    run = args_json(tmp_path / "args.json", args, rollbacks=3, rate=1)
    status, _, error = call("train_cifar.py", "--like", run, "--device=cpu", "--epochs=1", "--fname", tmp_path / "run")
    assert status == 0 and error == f"# --like {run}: --rollbacks, --rate ignored: no longer supported\n"
    assert json.loads((tmp_path / "run/args.json").read_text())["args"]["train_samples"] == 80


def test_what_may_change_when_a_run_is_resumed():
    """All that its weights and its best model do not depend on."""
    assert FLAGS.keys() - {name for name, each in FLAGS.items() if each.metadata["fixed"]} == {
        "data_dir", "fname", "resume", "eval", "quiet", "allow_changes", "device", "tf32", "compile", "compile_mode",
        "chkpt_iters", "chkpt_steps", "last_samples", "final_iters", "final_restarts", "final_samples", "final_model",
        "deterministic", "method", "recipe", "on_collapse", "tensorboard", "like"}
    assert {name for name, each in FLAGS.items() if each.metadata["scores"]} == {
        "epsilon", "norm", "pgd_alpha", "test_iters", "test_restarts", "test_samples", "full_test", "val_size",
        "dummy"}
    assert {name for name, each in FLAGS.items() if each.metadata["orders"]} == {
        "batch_size", "seed", "train_samples", "val_size", "dummy"}


def test_help_into_a_closed_pipe_is_one_line():
    command = f"{sys.executable} {ROOT / 'train_cifar.py'} --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr in ("", "train_cifar.py: error: standard output was closed\n")


def test_a_data_set_needs_no_defaults_of_its_own(tmp_path, call, monkeypatch):
    plain = options.DataSet("My images", "none", 10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    args = options.parse(plain, argv=[])
    assert (args.fname, args.zero_qval, args.lr_schedule, args.epochs) == ("my_images_model", 0.35, "onedrop", 52)


def test_code_without_its_own_repository_names_no_commit_of_another(tmp_path):
    """As an installed copy that lies in a repository of the user's."""
    shutil.copytree(ROOT / "singlestep", tmp_path / "singlestep", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "own.txt").write_text("x")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["add", "own.txt"], ["commit", "-qm", "own"]):
        subprocess.run([*git, *words], check=True)
    done = subprocess.run([sys.executable, "-c", "from singlestep.run.device import commit; print(commit())"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr


@pytest.mark.parametrize("flag, hint", [
    ("--epsilon=0.031", "did you mean 7.9"), ("--pgd-alpha=0.00784", "did you mean 2?"),
    ("--fgsm-alpha=10", "did you mean 1.25?"), ("--pgd-step=4.5", "did you mean 0.562?"),
    ("--std=63,62,66", "did you mean 0.247,0.243,0.259?"),
    ("--fgsm-alpha=4", ""), ("--epsilon=1", "")])
def test_training_gives_a_hint_for_a_value_in_another_unit(flag, hint):
    hints = options.unit_hints(options.parse(options.CIFAR10, argv=[flag]).flags())
    assert len(hints) == bool(hint) and hint in "".join(hints)
