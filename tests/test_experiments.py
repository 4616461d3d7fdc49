"""The tables: their definitions, the runner as a user runs it, and what the report says of results known beforehand."""
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import DATASETS, ROOT, script
from processes import Started, forked

from singlestep import options, train
from singlestep.run.folder import Folder

sys.path.insert(0, str(ROOT / "experiments"))
import demo
import mixed
import probe
import report
import reproduce
import sheet
from definitions import SCALES, TABLES, Experiment, experiments
from results import read_result, write_result


def run_tables(tmp_path, *flags: str) -> subprocess.CompletedProcess:
    return forked("experiments/reproduce.py", *flags, *places(tmp_path))


def places(tmp_path) -> list[str]:
    return ["--scale=smoke", f"--runs={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}"]


def results_of(tmp_path) -> dict[str, dict]:
    """What was found, but for how long it took."""
    def timeless(record):
        if isinstance(record, dict):
            return {key: timeless(value) for key, value in record.items() if key not in ("seconds",) and
                    not key.endswith("_time")}
        return [timeless(value) for value in record] if isinstance(record, list) else record
    return {path.stem: timeless(json.loads(path.read_text())) for path in (tmp_path / "results/smoke").glob("*.json")}


@pytest.mark.parametrize("scale", SCALES)
def test_every_command_of_every_table_is_one_that_its_script_takes(scale):
    runs = experiments(list(TABLES), scale, (0, 1))
    fewest = {"short": 31, "seeds": 2, "demo": 4, "demo-bf16": 4}.get(scale, 81)
    assert len({run.name for run in runs}) == len(runs) >= fewest
    meant = {}
    for run in runs:
        name, *flags = run.command
        args = options.parse(DATASETS[name], argv=flags)
        assert args.epochs == run.epochs
        assert meant.setdefault(tuple(sorted((k, str(v)) for k, v in args.flags().items())), run.name) == run.name
    assert run.seed == 1 and {run.scale for run in runs} == {scale}


def test_a_later_flag_overrides_an_earlier_one():
    run = Experiment("paper", "cifar10", "--attack=fgsm --no-amp --lr-max=0.05", 3)
    assert run.command == ["train_cifar.py", "--epochs=30", "--lr-schedule=cyclic", "--lr-max=0.05", "--no-amp",
                           "--attack=fgsm", "--seed=3"]
    assert run.name == "cifar10_fgsm_no-amp_lr-max=0.05_seed=3"


def test_the_runs_of_the_first_table_come_first_and_one_seed_of_all_before_the_next():
    runs = experiments(["cifar10", "quantile"], "paper", (0, 1))
    first = len(TABLES["cifar10"].rows)
    assert [run.seed for run in runs[:2 * first]] == [0] * first + [1] * first
    assert len(runs) == 2 * first + 2 * (len(TABLES["quantile"].rows) - 2)  # two of its rows are in the first table


def test_the_table_of_precisions_has_three_of_them():
    commands = [run.command for run in experiments(["precision"], "paper", (0,))]
    assert [[flag for flag in command if "amp" in flag or "tf32" in flag] for command in commands] == [
        ["--no-amp", "--no-tf32"], ["--no-amp"], ["--amp"]]


@pytest.mark.slow
def test_the_runner_makes_what_is_missing_and_makes_it_again_with_the_same_bits(tmp_path):
    flags = ["quantile", "--only=zero-qval=0_", "--seeds=2", "--jobs=2"]
    done = run_tables(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    first = results_of(tmp_path)
    assert len(first) == 2
    record = first["cifar10_zerograd_zero-qval=0_seed=1"]
    assert record["command"].startswith("python train_cifar.py --epochs=2 ") and "--seed=1" in record["command"]
    assert [epoch["epoch"] for epoch in record["epochs"]] == [0, 1] and record["final"]["images"] == 64
    assert str(tmp_path) not in json.dumps(record)
    assert "2 of 2 runs have results" in run_tables(tmp_path, *flags).stdout
    for path in (tmp_path / "results/smoke").iterdir():
        path.unlink()
    shutil.rmtree(tmp_path / "runs/smoke/cifar10_zerograd_zero-qval=0_seed=0")  # one run anew, one result from its run
    assert run_tables(tmp_path, *flags).returncode == 0
    assert results_of(tmp_path) == first
    made = forked("experiments/report.py", "--scale=smoke", "--results", tmp_path / "results", "--out",
                  tmp_path / "report")
    assert made.returncode == 0 and "`train_cifar.py --seed=1`" in (tmp_path / "report/smoke.md").read_text()
    run = tmp_path / "runs/smoke/cifar10_zerograd_zero-qval=0_seed=0"
    drawn = forked("experiments/sheet.py", run, "--images=2", "--out", tmp_path / "sheet.png")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_runner_survives_a_failed_run_a_locked_one_and_ctrl_c(tmp_path):
    names = [f"cifar10_zerograd_zero-qval={q}_seed=0" for q in ("0.2", "0.5", "0.9")]
    folders = [tmp_path / "runs/smoke" / name for name in names]
    folders[0].mkdir(parents=True)
    (folders[0] / "state.pth").write_text("no checkpoint")
    folders[1].mkdir()
    (tmp_path / "results/smoke").mkdir(parents=True)
    (tmp_path / "results/smoke" / f"{names[2]}.json").write_text('{"command": "of another definition"}')
    flags = ["quantile", "--only=zero-qval=0.", "--jobs=5"]
    other = Folder(folders[1])
    other.lock()
    done = run_tables(tmp_path, *flags)
    other.release()
    assert done.returncode == 1
    assert f"failed: {names[0]}" in done.stderr and "state.pth is truncated" in done.stdout
    assert f"{names[1]} is skipped: another process" in done.stdout and "Traceback" not in done.stderr
    assert names[0] not in results_of(tmp_path) and names[1] not in results_of(tmp_path)
    assert len(results_of(tmp_path)) == 3
    assert read_result(tmp_path / "results", Experiment("smoke", "cifar10", "--attack=zerograd --zero-qval=0.9", 0))

    (folders[0] / "state.pth").unlink()
    (folders[0] / "console.log").unlink()
    for sign in ("console.log", "args.json"):  # before and after a run looks out for signals
        started = Started("experiments/reproduce.py", "quantile", "--only=zero-qval=0.", *places(tmp_path))
        started.wait_for(folders[0] / sign)
        started.send_signal(signal.SIGINT)
        done = started.finish(timeout=120)
        assert done.returncode == 130, done.stderr
        assert "stopped by SIGINT: 0 runs made, 2 left" in done.stdout and "failed:" not in done.stderr + done.stdout
        assert "Traceback" not in done.stderr
    other = Folder(folders[0])
    other.lock()  # no run goes on behind the runner's back
    other.release()
    assert "stopped by SIGTERM" in (folders[0] / "console.log").read_text()
    done = run_tables(tmp_path, *flags)
    assert done.returncode == 0 and len(results_of(tmp_path)) == 5
    assert "# resumed" in (folders[0] / "output.log").read_text()


def test_a_run_that_another_runner_was_quicker_to_start_is_no_failure(tmp_path):
    runs = experiments(["cifar10"], "smoke", (0,))[:2]
    runner = reproduce.Runner(runs, SimpleNamespace(runs=tmp_path, results=tmp_path, budget=1.0, jobs=1))
    quicker = Folder(runner.folder(runs[0]))
    quicker.lock()
    for run in runs:
        runner.folder(run).mkdir(parents=True, exist_ok=True)
        (runner.folder(run) / "console.log").write_text("error: --fname is in use\n")
        runner.finish(reproduce.Job(run, 0, SimpleNamespace(returncode=2)))
    quicker.release()
    assert runner.elsewhere == runs[:1] and runner.failed == runs[1:]


@pytest.mark.slow
def test_the_runner_evaluates_a_run_where_its_row_asks_for_attacks(tmp_path):
    run = Experiment("smoke", "cifar10", "--attack=fgsm", 0, attacks="clean,fgsm")
    runner = reproduce.Runner([run], SimpleNamespace(runs=tmp_path / "runs", results=tmp_path / "results", budget=9.0,
                                                     jobs=1, data_dir=None))
    runner.start(run)
    for evaluates in (False, True):
        job = runner.running.pop()
        assert (job.process.wait(timeout=120), job.evaluates) == (0, evaluates)
        runner.finish(job)
    assert not runner.running and runner.made == [run]
    result = read_result(tmp_path / "results", run)
    assert [row["attack"] for row in result["evaluations"][0]["attacks"]][:2] == ["clean", "fgsm"]
    write_result(tmp_path / "results", run, {**result, "evaluations": []})
    assert read_result(tmp_path / "results", run) is None


def test_a_stopped_run_is_a_result_of_as_many_epochs_as_it_says(tmp_path):
    write_known(tmp_path, "--attack=pgd", 0, [0.4])
    run = Experiment("smoke", "cifar10", "--attack=pgd", 0)
    path = tmp_path / f"smoke/{run.name}.json"
    result = {**json.loads(path.read_text()), "final": None}
    for stopped, there in ((None, False), (2, False), (1, True)):
        write_result(tmp_path, run, {**result, "stopped": stopped})
        assert bool(read_result(tmp_path, run)) == there
    write_known(tmp_path, "--attack=pgd", 1, [0.3, 0.2])
    text = report.write_report(report.Results(tmp_path, "smoke"), tmp_path / "out").read_text()
    assert "--seed=0`, stopped after epoch 1 |" in text
    for row in ("| PGD-10 | 80.0 | 40.0 | - |", "| PGD-10 | 40.0 | 20.0 | 30.0 @ 1 |"):
        assert row in text


def test_a_spent_budget_stops_the_runner(tmp_path):
    done = run_tables(tmp_path, "cifar10", "--budget=0")
    assert done.returncode == 0 and "the budget is spent: 0 runs made" in done.stdout and not results_of(tmp_path)


def stub(folder, name: str, status: int) -> None:
    """A command that writes its arguments to `calls` beside it."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho {name} "$@" >>{folder}/calls\nexit {status}\n')
    path.chmod(0o755)


def test_the_plain_sweep_makes_every_quantile_and_passes_flags_on(tmp_path):
    stub(tmp_path, "python", 0)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([ROOT / "experiments/sweep_qval.sh", "--data-dir", "a b"], env=environment, check=True)
    *calls, looked, compared = (tmp_path / "calls").read_text().splitlines()
    folders = [re.search("--fname=(\\S+)", call)[1] for call in calls]
    assert "matplotlib" in looked and compared.split() == ["python", "plot.py", *folders, "--out=runs/zerograd_q.png"]
    assert [re.search("--zero-qval=(\\S+)", call)[1] for call in calls] == ["0", "0.2", "0.35", "0.5", "0.7", "0.9"]
    assert all("--resume=auto" in call and call.endswith("--data-dir a b") for call in calls)
    assert len(set(folders)) == 6
    (tmp_path / "calls").unlink()
    subprocess.run([ROOT / "experiments/sweep_qval.sh"], env={**environment, "QS": "0.1 0.3"}, check=True)
    *calls, _, compared = (tmp_path / "calls").read_text().splitlines()
    assert "runs/zerograd_q0.1 runs/zerograd_q0.3" in compared
    assert [re.search("--zero-qval=(\\S+)", call)[1] for call in calls] == ["0.1", "0.3"]


def test_the_sweep_ends_in_the_table_where_there_is_no_matplotlib(tmp_path):
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n[ "$1" != -c ]\n')
    (tmp_path / "python").chmod(0o755)
    subprocess.run([ROOT / "experiments/sweep_qval.sh"], check=True,
                   env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "QS": "0.5"})
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "plot.py runs/zerograd_q0.5"


@pytest.fixture
def run_main(call_main, monkeypatch):
    """A script of experiments/ within this process, without GPUs: run_main(module, *flags)."""
    for module in (reproduce, probe):
        monkeypatch.setattr(module, "cuda_devices", lambda: 0)
    return call_main


def test_the_demo_trains_on_both_methods_and_draws_them(tmp_path, call_main, monkeypatch, small_dummy, shallow):
    pytest.importorskip("matplotlib")

    def run(command: list[str]) -> SimpleNamespace:
        _, script, *flags = command
        if Path(script).name == "plot.py":
            monkeypatch.setattr(sys, "argv", [script, *flags])
            report.figures.main()
        else:
            train.main(options.CIFAR10, options.parse(options.CIFAR10, argv=flags))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=run))
    status, output, error = call_main(demo, "--scale=smoke", "--seed=1", "--runs", tmp_path)
    assert (status, error) == (0, "")
    assert re.findall(r"^method +(\S+):", output, re.M) == re.findall(r"^(n-fgsm|fgsm) +2 ", output, re.M) == [
        "fgsm", "n-fgsm"]
    assert output.endswith("demo.png\n") and (tmp_path / "smoke/demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_takes_the_precision_that_the_processor_is_made_for_and_ends_where_a_run_fails(call_main, monkeypatch):
    commands = []

    def run(command: list[str]) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=run))
    for scale, lowered in (("cpu-bf16", True), ("cpu", False), ("paper", False)):
        monkeypatch.setattr(demo, "default_scale", lambda scale=scale: scale)
        assert call_main(demo, "--data-dir=images")[0] == 3
        assert ("--amp" in commands[-1]) == ("--compile" in commands[-1]) == lowered
        assert {"--data-dir=images", "--method=fgsm", "--epsilon=16", "--train-samples=5000"} <= set(commands[-1])
    assert len(commands) == 3


UNWRITABLE = "/proc/none"  # a folder that not even root can make


@pytest.mark.parametrize("module, flags, named", [
    (reproduce, ["tabel"], "tabel"), (reproduce, ["--scale=cpu", "--only=nope"], "--only"),
    (reproduce, ["precision", "--scale=cpu"], "no runs at --scale=cpu"), (reproduce, ["--seeds=0"], "--seeds"),
    (reproduce, ["--scale=paper"], "needs a GPU"), (reproduce, ["--scale=smoke", "--runs", __file__], "--runs"),
    (reproduce, ["--runs="], "--runs"), (reproduce, ["--results="], "--results"), (report, ["--out="], "--out"),
    (report, ["--results", "FOLDER"], "holds no results"), (report, ["--results="], "--results"),
    (report, ["--scale=cpu", "--out", UNWRITABLE], "--out"), (sheet, ["FOLDER"], "args.json"), (sheet, [""], "run"),
    (probe, ["FOLDER"], "needs a CUDA GPU"), (probe, ["", "--dummy"], "OUT"), (probe, [__file__, "--dummy"], "OUT")])
def test_mistakes_are_one_line(run_main, tmp_path, module, flags, named):
    status, output, error = run_main(module, *(str(tmp_path) if flag == "FOLDER" else flag for flag in flags))
    assert (status, error.count("\n"), output) == (2, 1, "") and named in error


def write_known(folder, flags: str, seed: int, accuracies: list[float]) -> None:
    run = Experiment("smoke", "cifar10", flags, seed)
    epochs = [{"test_acc": 2 * acc, "test_robust_acc": acc, "train_robust_acc": acc, "train_time": 10.0,
               "test_images": 10000} for acc in accuracies]
    machine = {"commit": "abc", "device": "CPU", "threads": 1, "torch": "2.7", "torchvision": "0.22", "python": "3.10"}
    write_result(folder, run, {
        "name": run.name, "command": " ".join(["python", *run.command]), "jobs": 2, "starts": [machine],
        "final": {"robust_acc": accuracies[-1], "iters": 10, "restarts": 1, "images": 1000, "model": "last"},
        "epochs": epochs})


def test_a_damaged_result_is_left_out_and_made_again(tmp_path):
    write_known(tmp_path, "--attack=pgd", 0, [0.4, 0.2])
    run, *_ = experiments(["cifar10"], "smoke", (0,))
    damaged = tmp_path / "smoke" / f"{run.name}.json"
    for content in ("{", "[]", "\xff", "", '{"epochs": [1, 2]}', json.dumps({
            "command": " ".join(["python", *run.command]), "epochs": [{}, {}], "final": {}, "starts": [{}]})):
        damaged.write_bytes(content.encode("latin-1"))
        assert read_result(tmp_path, run) is None
        results = report.Results(tmp_path, "smoke")
        assert results.refused == [damaged] and len(results.by_name) == 1


def test_letters_that_ascii_has_not_and_closed_streams_are_no_obstacle(tmp_path):
    write_known(tmp_path / "Ärger", "--attack=pgd", 0, [0.4, 0.2])
    where = [f"--results={tmp_path / 'Ärger'}", "--scale=smoke"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = script("experiments/report.py", *where, f"--out={tmp_path / 'Überblick'}", env=environment)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "Überblick/smoke.md").exists()
    line = shlex.join([sys.executable, f"{ROOT}/experiments/reproduce.py", "cifar10", f"--runs={tmp_path / 'Läufe'}",
                       *where])
    for flag, closed in (("--budget=0", ">&-"), ("--list", ">&- 2>&- <&-")):
        done = subprocess.run(["sh", "-c", f"{line} {flag} {closed}"], capture_output=True, env=environment)
        assert (done.returncode, done.stderr) == (0, b"")
    assert not (tmp_path / "Läufe").exists()


def test_a_result_that_cannot_be_written_fails_its_run_alone(tmp_path):
    run, = experiments(["precision"], "smoke", (0,))[:1]
    runner = reproduce.Runner([run], SimpleNamespace(runs=tmp_path, results=Path(UNWRITABLE), budget=1.0, jobs=1))
    folder = runner.folder(run)
    folder.mkdir(parents=True)
    machine = dict.fromkeys(("commit", "device", "threads", "torch", "torchvision", "python"), "x")
    (folder / "args.json").write_text(json.dumps({"starts": [machine]}))
    (folder / "final.json").write_text('{"robust_acc": 0.1}')
    (folder / "metrics.jsonl").write_text('{"test_acc": 0.1}\n')
    runner.finish(reproduce.Job(run, 0, SimpleNamespace(returncode=0)))
    assert runner.failed == [run] and not runner.made


def test_the_list_is_a_line_a_run_and_tells_how_long_they_take(tmp_path, run_main):
    write_known(tmp_path / "results", "--attack=pgd", 0, [0.4, 0.2])
    flags = ["cifar10", "--list", "--jobs=2"]
    _, output, _ = run_main(reproduce, *flags, *places(tmp_path))
    *lines, total = output.splitlines()
    assert len(lines) == 7 and all(line.startswith("cifar10  cifar10_") for line in lines)
    states = {line.split()[1]: line.split()[2:] for line in lines}
    assert states["cifar10_pgd_seed=0"] == ["0", "min", "done"]
    assert all(state[-1] == "missing" and "~" not in state[0] for name, state in states.items() if "pgd" not in name)
    assert total.startswith("1 of 7 runs have results") and "--jobs=2" in total
    _, output, _ = run_main(reproduce, *flags, *places(tmp_path / "none"))
    assert all("~" in line for line in output.splitlines()[:-1])
    known = {run: result for run in experiments(["cifar10"], "smoke", (0,)) if (
        result := read_result(tmp_path / "results", run))}
    fgsm, *_, multigrad, pgd, _ = experiments(["cifar10"], "smoke", (0,))
    took = 20 / 60  # two epochs of ten seconds
    for run, times in ((fgsm, 2 / 11), (multigrad, 4 / 11), (pgd, 1)):
        assert reproduce.expected(run, known) == (pytest.approx(took * times), True)


def test_scale_and_jobs_are_those_that_the_machine_is_made_for(monkeypatch):
    monkeypatch.setattr(reproduce, "cores", lambda: 3)
    for gpus, bfloat16, compiler, scale, jobs in (
            (["0", "1"], False, None, "paper", 2), ([], True, "g++", "cpu-bf16", 3), ([], True, None, "cpu", 3),
            ([], False, "g++", "cpu", 3)):
        monkeypatch.setattr(reproduce, "gpus", lambda gpus=gpus: gpus)
        monkeypatch.setattr(reproduce, "has_bfloat16", lambda known=bfloat16: known)
        monkeypatch.setattr(reproduce.shutil, "which", lambda name, found=compiler: found)
        monkeypatch.setattr(reproduce, "MEMORY", 1)
        assert (reproduce.default_scale(), reproduce.default_jobs(scale)) == (scale, jobs)
        assert reproduce.default_jobs("cpu-short") == 3  # whatever GPUs there are
    assert reproduce.default_jobs("cpu-paper") == 1
    monkeypatch.setattr(reproduce, "MEMORY", 1 << 60)
    assert reproduce.default_jobs("cpu") == 1
    monkeypatch.undo()
    assert reproduce.has_bfloat16() in (True, False)


def test_the_report_gives_means_deviations_and_collapses(tmp_path):
    for seed, last in enumerate((0.1, 0.2, 0.3)):
        write_known(tmp_path, "--attack=zerograd --zero-qval=0.35", seed, [0.4, last])
    write_known(tmp_path, "--attack=zerograd --zero-qval=0.7", 0, [0.2, 0.45])
    for name, content in (("damaged", "{"), ("cifar10_fgsm_fgsm-alpha=1.25_seed=0", '{"command": "python other.py"}')):
        (tmp_path / "smoke" / f"{name}.json").write_text(content)
    results = report.Results(tmp_path, "smoke")
    assert len(results.by_name) == 4 and len(results.refused) == 2
    path = report.write_report(results, tmp_path / "out")
    text = path.read_text()
    assert statistics.stdev((10, 20, 30)) == 10
    row = "| 40.0 ± 20.0 | 20.0 ± 10.0 | 40.0 ± 0.0 @ 1 | 20.0 ± 10.0 | 10.0 ± 0.0 | 1 of 3, epoch 2 | 0, 1, 2 |"
    assert f"| ZeroGrad, q = 0.35 {row}" in text
    assert "| ZeroGrad, q = 0.7 | 90.0 | 45.0 | 20.0 @ 1 | 45.0 | 10.0 | no | 0 |" in text
    assert "5 of the 7 rows of this table are not measured yet" in text
    assert text.count("--lr-schedule=cyclic") == 1 and "| `train_cifar.py --zero-qval=0.7 --seed=0` |" in text
    assert "FGSM-RS" not in text and "MultiGrad over" not in text  # nothing was measured there
    quantiles = text.index("over q")
    assert text.index("| 0.35 | 40.0", quantiles) < text.index("| 0.7 | 90.0", quantiles)
    for name in ("cifar10", "quantile"):
        assert (tmp_path / f"out/smoke_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"out/smoke_{name}.pdf").read_bytes().startswith(b"%PDF")
    assert not (tmp_path / "out/smoke_epsilon.png").exists()  # one epsilon makes no curve
    for figure in (report.figure_of_epochs("cifar10", results), report.figure_of_quantiles("quantile", results)):
        for axes in figure.axes:
            curves = [line for line in axes.lines if not line.get_label().startswith("_")]
            assert len(curves) > 1 and all(len(line.get_xdata()) > 1 for line in curves)
            assert max(max(line.get_ydata()) for line in curves) <= axes.get_ylim()[1] and axes.get_ylim()[0] == 0
            assert {text.get_text() for text in figure.legends[0].get_texts()} == {line.get_label() for line in curves}


def test_rows_of_one_epsilon_make_no_curve_over_it(tmp_path):
    for flags in ("--attack=pgd", "--attack=pgd --epsilon=16 --pgd-alpha=4", "--attack=multigrad --multi-samps=3"):
        write_known(tmp_path, flags, 0, [0.4, 0.2])
    figure = report.figure_of_epsilons("epsilon", report.Results(tmp_path, "smoke"))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["PGD-10"]
    assert [line.get_label() for axes in figure.axes for line in axes.lines] == ["PGD-10", "PGD-10"]


def test_the_committed_reports_are_those_of_the_committed_results(tmp_path, monkeypatch):
    """Those that git lists: a user's own may lie beside them."""
    for name in ("legend_below", "save"):  # the text needs no picture
        monkeypatch.setattr(report.figures, name, lambda *args, **style: None)
    listed = subprocess.run(["git", "ls-files", "experiments/results"], cwd=ROOT, text=True, capture_output=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    for path in listed.stdout.splitlines():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    scales = [path.name for path in (tmp_path / "experiments/results").iterdir()]
    assert "cpu" in scales
    for scale in scales:
        results = report.Results(tmp_path / "experiments/results", scale)
        assert not results.refused
        text = report.write_report(results, tmp_path).read_text()
        assert text == (ROOT / f"experiments/report/{scale}.md").read_text()


def test_a_mixed_run_takes_each_purposes_numbers_from_its_own_seed(tmp_path, small_dummy, shallow, monkeypatch):
    keys: set[tuple[int, int]] = set()
    seed_everything = train.seed_everything

    def recorded(purpose: int, seed: int, *rest: int) -> None:
        keys.add((purpose, seed))
        seed_everything(purpose, seed, *rest)

    monkeypatch.setattr(train, "seed_everything", recorded)  # also restores it, which train_mixed replaces
    flags = mixed.mixture("smoke", (5, 6, 7)).command[5:]
    mixed.train_mixed(5, 6, 7, [*flags, f"--fname={tmp_path / 'run'}", "--epochs=1"])
    assert keys == {(train.WEIGHTS, 5), (train.ORDER, 6), (train.STEP, 7), (train.WATCH, 5)}


def test_the_mixed_runs_are_eighteen_and_their_corners_are_the_tables_runs(monkeypatch):
    every = {mixed.mixture("cpu-short-bf16", seeds) for pair in mixed.PAIRS for seeds in product(pair, repeat=3)}
    corners = {each for each in every if not isinstance(each, mixed.Mixed)}
    assert len({each.name for each in every}) == len(every) == 18 + len(corners)
    assert corners == {each for each in experiments(["rivals"], "cpu-short-bf16", (0, 1, 2, 3, 4))
                       if each.flags == "--attack=zerograd --zero-qval=0.35"}
    assert all(mixed.outcome(ROOT / "experiments/results", corner) is not None for corner in corners)


def test_the_shares_of_what_decides_are_those_of_outcomes_known_beforehand(tmp_path, monkeypatch):
    keys = list(product((0, 1), repeat=3))
    nothing = dict.fromkeys((*mixed.SOURCES, "interactions"), 0.0)
    assert mixed.shares(dict.fromkeys(keys, 30.0)) == nothing
    for source, title in enumerate(mixed.SOURCES):
        assert mixed.shares({key: 30.0 * key[source] for key in keys}) == pytest.approx({**nothing, title: 1})
    assert mixed.shares({key: float(key[0] ^ key[1]) for key in keys}) == pytest.approx({**nothing, "interactions": 1})
    assert mixed.shares({key: 3.0 * key[0] + 4.0 * key[2] for key in keys}) == pytest.approx(
        {**nothing, "initial weights": 0.36, "random starts": 0.64})
    monkeypatch.setattr(mixed, "outcome", lambda results, e: None if e.seed > 1 else 30.0 * e.seed)
    mixed.write_report("cpu-short-bf16", tmp_path, tmp_path)
    text = (tmp_path / "mixed.md").read_text()
    assert "| 0, 1 | 1 | 0 | 1 | 30.0 |" in text and "| 0, 1 | 100% | 0% | 0% | 0% |" in text and "| 2, 3 |" not in text


def gpu_script(*words) -> subprocess.CompletedProcess:
    """experiments/gpu.sh on a machine without a GPU."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run([ROOT / "experiments/gpu.sh", *words], text=True, capture_output=True,
                          env={**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": ""})


def test_the_probe_writes_a_line_for_each_item(tmp_path):
    """Also without a GPU: recorded steps have the bits of plain ones, and tests/test_cuda.py skips all its tests."""
    done = gpu_script(tmp_path / "out", "probe", "--dummy")
    assert done.returncode == 0, done.stderr
    found = {line["item"]: line for line in map(json.loads, (tmp_path / "out/probe.jsonl").read_text().splitlines())}
    assert not [line for line in found.values() if "error" in line]
    assert {name.split()[0] for name in found} == {
        "facts", "ceilings", "step", "evaluation", "captured", "kernels", "memory", "tests"}
    for method in ("zerograd", "multigrad", "pgd"):
        step = found[f"step --method={method} --amp"]
        assert step["step"] == step["host"] == step["device"] > 0
    for name in ("captured", "captured --amp"):
        replayed = found[name]["replayed"]
        assert replayed["tensors"] == 0 and replayed["of"] > 100 and not found[name]["graph"]
    assert found["evaluation"]["epsilons"][0]["robust"] == 1
    assert found["kernels --amp"]["longest"] and found["memory --model=WideResNet --amp"]["evaluation_batch"] > 0
    tests = found["tests"]
    assert tests["tests"] == tests["skipped"] > 0 and (tmp_path / "out/test_cuda.xml").exists()


def test_an_item_that_fails_is_a_line_and_the_next_one_follows(tmp_path, run_main, monkeypatch):
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probe.Probe, "items", lambda self: {"first": fails, "second": lambda: {"answer": 42}})
    for _ in range(2):
        status, _, error = run_main(probe, str(tmp_path), "--dummy")
        assert (status, error) == (0, "")
    first, second, *again = map(json.loads, (tmp_path / "probe.jsonl").read_text().splitlines())
    assert first["error"] == "OutOfMemoryError: CUDA out of memory" and second["answer"] == 42
    assert [line["item"] for line in again] == ["first", "second"]


@pytest.mark.parametrize("change", ["sums of the epoch's second half", "a learning rate of the host"])
def test_a_recorded_step_with_a_number_of_the_host_has_other_bits(change, monkeypatch, tmp_path):
    item = probe.Probe(tmp_path, probe.DUMMY)
    assert item.captured()["replayed"]["tensors"] == 0
    if change.startswith("sums"):
        monkeypatch.setattr(train.Run, "steps", 10)  # what is recorded at step 3 is not what step 5 does
    else:
        monkeypatch.setattr(probe.Captured, "step", lambda self: train.train_step(replace(
            self.run, schedule=lambda t: self.rate.item()), self.batch))
    assert item.captured()["replayed"]["tensors"] > 0


@pytest.mark.slow
def test_the_papers_commands_come_first_in_the_tables_of_a_gpu(tmp_path):
    done = gpu_script(tmp_path, "table", "--dummy", "--seeds=1", "--only=cifar10_zerograd")
    assert done.returncode == 0, done.stderr
    assert [path.stem for path in (tmp_path / "results/smoke").iterdir()] == [
        "cifar10_zerograd_zero-qval=0.35_seed=0"]
    assert "ZeroGrad, q = 0.35" in (tmp_path / "report/smoke.md").read_text()
    first, second, *_ = experiments(list(TABLES), "paper", (0, 1, 2))
    assert [run.flags for run in (first, second)] == [
        "--attack=zerograd --zero-qval=0.35", "--attack=multigrad --multi-samps=3"]


@pytest.mark.parametrize("words", [[], ["out"], ["out", "both"]])
def test_the_script_of_a_gpu_names_its_words(words):
    done = gpu_script(*words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "OUT probe" in done.stderr
