"""The Slurm scripts, with stubs of Slurm's commands: every index of an array makes the folder of its run."""
import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, TINY
from processes import forked, together
from torch.distributed.run import get_args_parser

SCRIPTS = ("sweep_qval", "seeds", "torchrun")
FLAGS = [*TINY, "--final-iters=0", "--no-amp", "--no-compile", "--data-dir", "a b"]
STUBS = {  # `python` and `torchrun` write down their words; `srun` runs a step on every machine
    "python": 'for word in python "$@"; do printf "%s\\0" "$word"; done >>calls; echo >>calls\nexit $PYTHON_STATUS',
    "torchrun": 'for word in "$@"; do printf "%s\\0" "$word"; done >>calls; echo >>calls\n'
                '[ $PYTHON_STATUS = 0 ] || kill -s $SENT $PPID; exit $PYTHON_STATUS',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; [ $SLURM_JOB_NUM_NODES = 1 ] || "$@"; exec "$@"',
    "scontrol": '[ $1 = show ] && seq -f node%g $SLURM_JOB_NUM_NODES || echo "$@" >>requeued'}


@pytest.fixture
def sbatch(tmp_path):
    """sbatch(name, *words, array, nodes, status): run experiments/NAME.slurm as Slurm would, one array index at a time.

    status: what the command that it starts ends with. Returns the ended processes.
    """
    for name, body in STUBS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "runs").mkdir()

    def submit(name: str, *words: str, array: str = "", nodes: int = 1, status: int = 0, **more: str):
        text = (ROOT / f"experiments/{name}.slurm").read_text()
        head = "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
        options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", head, re.M))
        assert head.count("#SBATCH") == text.count("#SBATCH") == len(options)
        assert (tmp_path / options["output"]).parent.is_dir()  # Slurm does not make it
        assert "Edit three lines" in head and {"partition", "gres", "mem", "time", "requeue"} <= options.keys()
        environment = "source .venv/bin/activate || exit\n"
        assert text.count(environment) == 1
        (tmp_path / "slurm_script").write_text(text.replace(environment, ""))
        chosen = (array or options.get("array", "")).partition("%")[0]
        first, _, last = chosen.partition("-")
        shared = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
                  "SLURM_JOB_ID": "36", "SLURM_JOB_NAME": options["job-name"], "SLURM_CPUS_PER_TASK": "4",
                  "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "2",
                  "PYTHON_STATUS": str(status), **more}
        tasks = [{"SLURM_ARRAY_JOB_ID": "36", "SLURM_ARRAY_TASK_ID": str(index)}
                 for index in range(int(first), int(last) + 1)] if chosen else [{}]
        return [subprocess.run(["bash", tmp_path / "slurm_script", *words], env={**shared, **task}, cwd="/",
                               capture_output=True, text=True) for task in tasks]
    return submit


def words_of(calls: Path) -> list[list[str]]:
    return [line.split("\0")[:-1] for line in calls.read_text().splitlines()]


@pytest.mark.parametrize("name, words, env, folders", [
    ("sweep_qval", [], {"QS": "0.1 0.7"}, ["zerograd_q0.1", "zerograd_q0.7"]),
    ("seeds", ["train_cifar.py"], {}, ["seeds_seed0", "seeds_seed1"])])
def test_every_index_makes_the_folder_of_its_run(name, words, env, folders, sbatch, tmp_path):
    done = sbatch(name, *words, *FLAGS, array="0-1", **env)
    assert [(each.returncode, each.stderr) for each in done] == 2 * [(0, "")]
    for python, script, *flags in words_of(tmp_path / "calls"):
        assert python == "python" and {"--amp", "--compile", "--resume=auto"} <= set(flags)
        assert forked(script, *flags, cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == folders
    assert all((tmp_path / "runs" / folder / "model_1.pth").exists() for folder in folders)


def test_the_arrays_have_all_quantiles_and_eight_seeds(sbatch, tmp_path):
    assert len(sbatch("sweep_qval")) == 6 and len(sbatch("seeds", "train_cifar.py")) == 8
    flags = {word for words in words_of(tmp_path / "calls") for word in words}
    assert {f"--zero-qval={q}" for q in ("0", "0.2", "0.35", "0.5", "0.7", "0.9")} <= flags
    assert {f"--seed={seed}" for seed in range(8)} <= flags and "--epochs=30" in flags


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_starts_one_run_on_every_machine(nodes, sbatch, tmp_path):
    done, = sbatch("torchrun", "train_cifar.py", *FLAGS, nodes=nodes)
    assert (done.returncode, done.stderr) == (0, "")
    calls = words_of(tmp_path / "calls")
    assert len(calls) == nodes and all(call == calls[0] for call in calls)
    args = get_args_parser().parse_args(calls[0])
    assert (args.nnodes, args.nproc_per_node, args.rdzv_backend, args.rdzv_id) == (str(nodes), "2", "c10d", "36")
    assert args.rdzv_endpoint == "node1:20036" and args.training_script == "train_cifar.py"
    if nodes == 1:
        assert together(args.training_script, *args.training_script_args, cwd=tmp_path).returncode == 0
        assert (tmp_path / "runs/torchrun/model_1.pth").exists()


def test_an_array_index_beyond_the_values_says_how_many_there_are(sbatch):
    done, = sbatch("sweep_qval", array="2-2", QS="0.1 0.3")
    assert done.returncode == 2 and done.stderr == "QS has 2 values: sbatch --array=0-1\n"


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("ended, restarts, again", [(0, "0", False), (1, "0", False), (143, "0", True),
                                                    (143, "19", True), (143, "20", False)])
def test_a_job_that_was_stopped_goes_back_into_the_queue_twenty_times(name, ended, restarts, again, sbatch, tmp_path):
    array, sent = ("", "TERM" if ended == 143 else "URG") if name == "torchrun" else ("5-5", "")
    status = min(ended, 1) if name == "torchrun" else ended  # torchrun's status is 1 after any signal
    done, = sbatch(name, "train_cifar.py", array=array, status=status, SENT=sent, SLURM_RESTART_COUNT=restarts)
    assert done.returncode == ended and (tmp_path / "requeued").exists() == again
    if again:
        assert (tmp_path / "requeued").read_text() == ("requeue 36\n" if name == "torchrun" else "requeue 36_5\n")
