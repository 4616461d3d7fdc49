"""The tables: their definitions, the runner as a user runs it, and what the report says of results known beforehand."""
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import DATASETS, ROOT, script

import options
from checkpoint import Folder

sys.path.insert(0, str(ROOT / "experiments"))
import report
import reproduce
from definitions import SCALES, TABLES, Experiment, experiments
from results import read_result, write_result


def run_tables(tmp_path, *flags: str) -> subprocess.CompletedProcess:
    return script("experiments/reproduce.py", *flags, *places(tmp_path))


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
    assert len({run.name for run in runs}) == len(runs) > 80
    meant = {}
    for run in runs:
        name, *flags = run.command
        args = options.parse(DATASETS[name], argv=flags)
        assert args.epochs == run.epochs
        assert meant.setdefault(tuple(sorted((k, str(v)) for k, v in vars(args).items())), run.name) == run.name
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
    assert "2 of 2 runs are there" in run_tables(tmp_path, *flags).stdout
    for path in (tmp_path / "results/smoke").iterdir():
        path.unlink()
    shutil.rmtree(tmp_path / "runs/smoke/cifar10_zerograd_zero-qval=0_seed=0")  # one run anew, one result from its run
    assert run_tables(tmp_path, *flags).returncode == 0
    assert results_of(tmp_path) == first
    made = script("experiments/report.py", "--scale=smoke", "--results", tmp_path / "results", "--out",
                  tmp_path / "report")
    assert made.returncode == 0 and "zero-qval=0 --seed=1" in (tmp_path / "report/smoke.md").read_text()
    run = tmp_path / "runs/smoke/cifar10_zerograd_zero-qval=0_seed=0"
    drawn = script("experiments/sheet.py", run, "--images=2", "--out", tmp_path / "sheet.png")
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
    assert f"failed: {names[0]}" in done.stderr and "state.pth is cut short" in done.stdout
    assert f"{names[1]} is being made by another process" in done.stdout and "Traceback" not in done.stderr
    assert names[0] not in results_of(tmp_path) and names[1] not in results_of(tmp_path)
    assert len(results_of(tmp_path)) == 3
    assert read_result(tmp_path / "results", Experiment("smoke", "cifar10", "--attack=zerograd --zero-qval=0.9", 0))

    (folders[0] / "state.pth").unlink()
    (folders[0] / "console.log").unlink()
    for sign in ("console.log", "args.json"):  # before and after a run looks out for signals
        started = subprocess.Popen([sys.executable, ROOT / "experiments/reproduce.py", "quantile",
                                    "--only=zero-qval=0.", *places(tmp_path)], text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        wait_for(folders[0] / sign)
        started.send_signal(signal.SIGINT)
        output, error = started.communicate(timeout=120)
        assert started.returncode == 130, error
        assert "stopped by SIGINT: 0 runs made, 2 left" in output and "failed:" not in error + output
        assert "Traceback" not in error
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


def wait_for(path) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.05)


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
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [re.search("--zero-qval=(\\S+)", call)[1] for call in calls] == ["0", "0.2", "0.35", "0.5", "0.7", "0.9"]
    assert all("--resume=auto" in call and call.endswith("--data-dir a b") for call in calls)
    assert len({re.search("--fname=(\\S+)", call)[1] for call in calls}) == 6
    (tmp_path / "calls").unlink()
    subprocess.run([ROOT / "experiments/sweep_qval.sh"], env={**environment, "QS": "0.1 0.3"}, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [re.search("--zero-qval=(\\S+)", call)[1] for call in calls] == ["0.1", "0.3"]


@pytest.mark.parametrize("status", (0, 1, 143))
def test_only_the_array_task_that_was_stopped_is_put_into_the_queue_again(tmp_path, status):
    stub(tmp_path, "srun", status)
    stub(tmp_path, "scontrol", 0)
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "36", "SLURM_ARRAY_JOB_ID": "36",
             "SLURM_ARRAY_TASK_ID": "5", "SLURM_CPUS_PER_TASK": "4"}
    done = subprocess.run(["bash", ROOT / "experiments/sweep_qval.slurm", "--data-dir=d"],
                          env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    first, *others = (tmp_path / "calls").read_text().splitlines()
    assert done.returncode == status and "--zero-qval=0.9 " in first and first.endswith("--data-dir=d")
    assert others == (["scontrol requeue 36_5"] if status == 143 else [])


def test_mistakes_are_one_line(tmp_path):
    for name, flags, named in (("reproduce.py", ["tabel"], "tabel"), ("sheet.py", [tmp_path], "args.json"),
                               ("report.py", ["--results", tmp_path], "holds no results"),
                               ("reproduce.py", ["--scale=cpu", "--only=nope"], "--only"),
                               ("reproduce.py", ["precision", "--scale=cpu"], "no runs at --scale cpu"),
                               ("reproduce.py", ["--seeds=0"], "--seeds"), ("reproduce.py", [], "needs a GPU"),
                               ("reproduce.py", ["--scale=smoke", "--runs", __file__], "--runs")):
        done = script(f"experiments/{name}", *flags, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr and not done.stdout


def write_known(folder, flags: str, seed: int, accuracies: list[float]) -> None:
    run = Experiment("smoke", "cifar10", flags, seed)
    epochs = [{"test_acc": 2 * acc, "test_robust_acc": acc, "train_robust_acc": acc, "train_time": 10.0,
               "test_images": 10000} for acc in accuracies]
    machine = {"commit": "abc", "device": "CPU", "threads": 1, "torch": "2.7", "torchvision": "0.22", "python": "3.10"}
    write_result(folder, run, {
        "name": run.name, "command": " ".join(["python", *run.command]), "jobs": 2, "starts": [machine],
        "final": {"robust_acc": accuracies[-1], "iters": 10, "restarts": 1, "images": 1000, "model": "last"},
        "epochs": epochs})


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
    row = "| 40.0 ± 20.0 | 20.0 ± 10.0 | 40.0 ± 0.0 | 20.0 ± 10.0 | 10.0 ± 0.0 | 1 of 3 | 0, 1, 2 |"
    assert f"| ZeroGrad, q = 0.35 {row}" in text
    assert "| ZeroGrad, q = 0.7 | 90.0 | 45.0 | 20.0 | 45.0 | 10.0 | no | 0 |" in text
    assert "FGSM-RS" not in text and "MultiGrad over" not in text  # nothing was measured there
    quantiles = text.index("over q")
    assert text.index("| 0.35 | 40.0", quantiles) < text.index("| 0.7 | 90.0", quantiles)
    for name in ("cifar10", "quantile"):
        assert (tmp_path / f"out/smoke_{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out/smoke_epsilon.png").exists()  # one epsilon makes no curve
    for figure in (report.figure_of_epochs("cifar10", results), report.figure_of_quantiles("quantile", results)):
        for axes in figure.axes:
            assert max(max(line.get_ydata()) for line in axes.lines) <= axes.get_ylim()[1] and axes.get_ylim()[0] == 0


def test_the_committed_reports_are_those_of_the_committed_results(tmp_path):
    """Those that git lists: a user's own may lie beside them."""
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
