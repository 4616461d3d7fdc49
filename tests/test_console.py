"""What a person sees: the banner, a line an epoch, bars, and what --quiet leaves of them."""
import fcntl
import json
import os
import pty
import re
import select
import shlex
import struct
import termios
from collections.abc import Callable

import pytest
import torch
from helpers import SMALL, linear_network, rows_of
from hypothesis import given
from hypothesis import strategies as st
from processes import Started, start_together

from singlestep import figures, train
from singlestep.checkpoints import load_run
from singlestep.networks import PreActResNet18
from singlestep.options import DATA_SETS, data_set, parse, pgd_hints
from singlestep.run import console
from singlestep.run.console import Screen, clock, duration, epoch_line

FLAGS = [*SMALL, "--attack=zerograd", "--zero-qval=0.5"]

accuracies = st.one_of(st.none(), st.floats(0, 1))
records = st.fixed_dictionaries({
    "epoch": st.integers(0, 999), "lr": st.floats(0, 0.9), "train_robust_acc": st.floats(0, 1), "test_acc": accuracies,
    "fgsm_acc": accuracies, "test_robust_acc": st.floats(0, 1), "train_time": st.floats(0, 5000),
    "test_time": st.floats(0, 5000)})


@given(st.lists(records, min_size=2, max_size=5))
def test_the_lines_of_a_run_are_aligned(history):
    history[0]["best"] = True
    lines = [epoch_line(record, history, 1000) for record in history]
    assert len({len(line) for line in lines}) == 1
    assert len({line.index("PGD") for line in lines}) == 1


def test_a_line_says_what_happened():
    healthy = {"epoch": 3, "lr": 0.16, "train_robust_acc": 0.431, "test_acc": 0.61, "fgsm_acc": 0.382, "best": True,
               "test_robust_acc": 0.374, "train_time": 100.4, "test_time": 23.5}
    later = {**healthy, "epoch": 11, "test_robust_acc": 0.021, "best": False, "collapsed": True}
    assert epoch_line(later, [healthy, later], 30).split() == [
        "12/30", "lr", "0.1600", "train", "43.1", "clean", "61.0", "FGSM", "38.2", "PGD", "2.1", "best", "37.4",
        "@4", "2:04", "COLLAPSED"]


@given(st.floats(0, 10**6))
def test_times_are_told_as_one_says_them(seconds):
    *hours, minutes, rest = map(int, clock(seconds).split(":"))
    assert 3600 * sum(hours) + 60 * minutes + rest == round(seconds)
    value = re.fullmatch(r"(?:(\d+) h (\d\d) min|(\d+) min|(\d+) s)", duration(seconds))
    hours, over, minutes, left = (int(part or 0) for part in value.groups())
    assert abs(3600 * hours + 60 * (over + minutes) + left - seconds) <= 30.01


SCRIPTS = {"cifar10": "train_cifar.py", "cifar100": "train_cifar100.py", "svhn": "train_svhn.py",
           "tiny": "train_tiny.py"}


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_banner_names_the_numbers_in_effect(name, call, tmp_path, small_dummy):
    flags = [*SMALL, "--epochs=1", "--method=zerograd", "--zero-qval=0.25", "--epsilon=6", "--fname", tmp_path / "run"]
    status, output, _ = call(SCRIPTS[name], *flags)
    assert status == 0
    method, data, network, folder = output.splitlines()[:4]
    for flag in ("zerograd: --attack=zerograd", "--epsilon=6", "--zero-qval=0.25", "--zero-iters=1", "--objective=ce"):
        assert flag in method, flag
    assert "--multi-samps" not in method and "False" not in method
    args = parse(data_set(name), argv=list(map(str, flags)))
    assert f"{data_set(name).name} (synthetic): " in data and " 1 epoch of " in data
    assert f"of base width {args.base_width}" in network and "float32" in network and folder.endswith("run")
    assert "python evaluate.py" in output and "python plot.py" in output


@pytest.mark.parametrize("seconds, images, samples, full", [
    (10.0, 1000, 1000, "about 38 min"), (600.0, 1000, 100, "about 38 h 20 min"),
    (6000.0, 100, 10, "about 3833 h 20 min")])
def test_the_command_after_a_run_takes_a_minute(seconds, images, samples, full):
    """The last epoch had PGD-10 on `images` in `seconds`; the full command, PGD-50-10, on 10,000."""
    args = parse(data_set("cifar10"), argv=["--fname=a run"])
    lines = console.results_lines(args, {"test_time": seconds, "test_images": images}, 10_000).splitlines()
    assert lines[1].endswith(f"python evaluate.py 'a run' --attacks=clean,fgsm,pgd-10-1 --samples={samples}")
    assert "PGD-50-10 on all 10,000 test images" in lines[2] and full in lines[2]
    assert "--attacks" not in console.results_lines(args, {}, 0)
    few = console.results_lines(args, {"test_time": 1.0, "test_images": 12}, 12)
    assert "--samples=12\n" in few  # not more than there are


def test_a_long_final_evaluation_is_announced_after_the_first_epoch(call, tmp_path, small_dummy, monkeypatch):
    args = parse(data_set("cifar10"), argv=["--test-iters=10", "--final-iters=50", "--final-restarts=10"])
    assert "PGD-50-10 on 10,000 images) may take 38 min" in console.final_estimate(args, 10.0, 1000, 10_000)
    assert not console.final_estimate(args, 1.0, 1000, 10_000)
    monkeypatch.setattr(console, "final_estimate", lambda *given: "# estimate")
    for epochs in (1, 2):
        output = call("train_cifar.py", *FLAGS, f"--epochs={epochs}", "--fname", tmp_path / str(epochs))[1]
        assert output.count("# estimate") == 1 and output.index("# estimate") < output.index(f"1/{epochs}  ")


def test_the_command_after_a_run_runs(call, evaluates, tmp_path, small_dummy):
    output = call("train_cifar.py", *FLAGS, "--final-iters=0", "--fname", tmp_path / "run")[1]
    command, = (line for line in output.splitlines() if "python evaluate.py" in line)
    _, script, *flags = shlex.split(command.partition(":")[2])
    status, table, error = evaluates(*flags, "--device=cpu")
    assert (script, status, error) == ("evaluate.py", 0, "")
    assert [row[0] for row in rows_of(table)] == ["clean", "fgsm", "pgd-10-1", "worst case"]


@pytest.mark.parametrize("flags, named", [
    (["--attack=fgsm", "--epsilon=32", "--test-iters=10", "--final-iters=50"], ["--test-iters=10 --pgd-alpha=2"]),
    (["--attack=fgsm", "--test-iters=10", "--final-iters=50"], []),
    (["--attack=fgsm", "--epsilon=16", "--test-iters=1", "--final-iters=0"], ["--test-iters=1 --pgd-alpha=2"]),
    (["--method=trades", "--pgd-iters=3", "--test-iters=4", "--final-iters=3"],
     ["--pgd-iters=3 --pgd-alpha=2", "--final-iters=3 --pgd-alpha=2"]),
    (["--method=pgd-2", "--pgd-step=0.4", "--epsilon=4"], ["--pgd-iters=2 --pgd-step=0.4"]),
    (["--method=pgd-2", "--epsilon=16"], [])])
def test_a_runs_pgd_that_cannot_cross_the_ball_is_noted(flags, named):
    hints = pgd_hints(parse(data_set("cifar10"), argv=flags))
    assert [hint.partition(": ")[0] for hint in hints] == named
    assert all("cannot reach the surface of the ball" in hint for hint in hints)


def test_an_epochs_pgd_that_is_weaker_than_fgsm_is_noted(call, tmp_path, small_dummy, monkeypatch):
    monkeypatch.setattr(train, "new_network", linear_network)  # which FGSM breaks as well as any attack
    flags = [*SMALL, "--attack=fgsm", "--lr-max=0", "--final-iters=0", "--epsilon=4"]
    for steps, told in ((1, True), (2, True), (8, False)):
        output = call("train_cifar.py", *flags, f"--test-iters={steps}", "--pgd-alpha=1", "--fname",
                      tmp_path / str(steps))[1]
        assert ("# --test-iters=" in output) == told
        assert output.count("# PGD is weaker than FGSM") == told  # once a run, not in both of its epochs
    output = call("train_cifar.py", *flags, "--pgd-alpha=1", "--eval", "--resume=auto", "--fname", tmp_path / "1")[1]
    assert "# --test-iters=2" in output and "pgd-2-1 is too weak" in output


def test_an_epoch_whose_attack_has_no_gradient_is_told_of(call, tmp_path, small_dummy, monkeypatch):
    def blind(dataset, args):
        network = linear_network(dataset, args)
        torch.nn.init.zeros_(network.linear.weight)
        return network

    monkeypatch.setattr(train, "new_network", blind)
    output = call("train_cifar.py", *SMALL, "--attack=fgsm", "--lr-max=0", "--quiet", "--fname", tmp_path / "run")[1]
    warnings = [line for line in output.splitlines() if "had a gradient of 0 for 100% of the images" in line]
    assert [line.partition(" had")[0] for line in warnings] == ["# warning: PGD"] * 2 + [
        "# warning: the final evaluation"]


def test_quiet_leaves_nothing_but_errors(call, tmp_path, small_dummy, monkeypatch):
    monkeypatch.setattr(train, "new_network", linear_network)  # one that surely does not collapse: quiet runs say that
    status, output, error = call("train_cifar.py", *FLAGS, "--lr-max=0", "--quiet", "--fname", tmp_path / "run")
    assert (status, output, error) == (0, "", "")
    assert (tmp_path / "run" / "final.json").exists()
    assert call("train_cifar.py", *FLAGS, "--fname", tmp_path / "run", "--resume=1", "--epsilon=7")[2].count("\n") == 1


@given(st.text())
def test_what_is_printed_controls_no_terminal(text):
    shown = console.printable(text)
    assert all(c.isprintable() or c in "\t\n" for c in shown)
    assert shown == text or not all(c.isprintable() or c in "\t\n" for c in text)


def on_a_terminal(start: Callable[..., Started | list[Started]], name, *flags, columns: int = 160) -> str:
    """What the script shows on a terminal of its own, started by `start` in one process or in several."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    started = start(name, *flags, terminal=os.ttyname(follower))
    processes = started if isinstance(started, list) else [started]
    shown = b""
    while any(process.running for process in processes) or select.select([leader], [], [], 0)[0]:
        if select.select([leader], [], [], 0.1)[0]:
            shown += os.read(leader, 65536)
    os.close(follower), os.close(leader)
    assert [process.finish().returncode for process in processes] == [0] * len(processes), shown.decode()
    return shown.decode()


def test_a_terminal_shows_a_bar_over_everything_that_takes_time(tmp_path):
    shown = on_a_terminal(Started, "train_cifar.py", *FLAGS, "--final-restarts=2", "--fname", tmp_path / "run")
    for bar in (r"reading CIFAR-10", r"training, epoch 2: .*loss=\d\.\d+, train=\d+\.\d", r"PGD-\d+: ", r"FGSM: ",
                r"PGD-\d+, restart 2/2, \d+\.\d% still robust: .* (\d+)/\1 "):
        assert re.search(bar, shown), bar


def test_a_terminal_without_columns_shows_lines(tmp_path):
    wait = tmp_path / "wait.py"
    wait.write_text("from singlestep.run import console\nconsole.MINUTES = 0\n"
                    "with console.Screen().progress('waiting', 2, 'step') as bar:\n    bar.update()\n")
    assert "# waiting: 1 of 2 steps, time left unknown" in on_a_terminal(Started, wait, columns=0)
    assert "0%|" in on_a_terminal(Started, wait) and "1 of 2" not in on_a_terminal(Started, wait)


def test_names_from_files_cannot_control_the_terminal(tmp_path, call, call_main, capsys, monkeypatch):
    """In a file's keys, in args.json, in a folder's name, in a flag, and over a bar."""
    red = "\x1b[31m"
    folder = tmp_path / f"{red}run\r"
    folder.mkdir()
    state = PreActResNet18(base_width=4).state_dict()
    torch.save({f"{red}net": {**state, f"{red}more.x": torch.zeros(1)}}, folder / "model.pt")
    load_run(folder / "model.pt", data_set="cifar10", base_width=4)
    shown = capsys.readouterr().out
    assert "\\x1b[31mrun\\r/model.pt: network \\x1b[31mnet of the file\n" in shown
    assert "unused in the file: \\x1b[31mmore" in shown
    (folder / "args.json").write_text(json.dumps({"data_set": red, "args": {"model": red}}))
    flags = ["--device=cpu", "--eval", "--resume=1", "--fname", folder]
    errors = [call_main(figures, folder)[2], call("train_cifar.py", *flags)[2], call("train_cifar.py", f"--{red}")[2]]
    monkeypatch.setattr(console, "drawable", lambda: True)
    with Screen().progress(f"reading {red}") as bar:
        bar.tell(f"training on {red}")
    bars = capsys.readouterr().err
    assert red not in bars and "reading \\x1b[31m" in bars
    for text in (shown, *errors):
        assert "x1b[31m" in text and all(c.isprintable() or c == "\n" for c in text), text


def test_off_a_terminal_a_long_wait_says_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(console, "MINUTES", 0)
    with Screen().progress("epoch 0", 100, "step", 10) as bar:
        bar.tell("epoch 0", loss="1.23")
        for _ in range(3):
            bar.update(40)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# epoch 0: 50 of 100 steps, loss 1.23, time left unknown"
    assert re.fullmatch(r"# epoch 0: 90 of 100 steps, loss 1\.23, about 0 s left", lines[1])
    assert lines[2].startswith("# epoch 0: 100 of 100 steps")  # never more than there are


def test_of_two_processes_one_shows_a_bar_which_ends_full(tmp_path):
    shown = on_a_terminal(start_together, "train_cifar.py", *FLAGS, "--epochs=1", "--final-restarts=2", "--fname",
                          tmp_path / "run")
    assert re.search(r"PGD-\d+, restart 2/2, \d+\.\d% still robust: +100%.* (\d+)/\1 ", shown)
    assert shown.count("final evaluation of the last model") == 1
