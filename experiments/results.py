"""The result of a run: one JSON file, written by reproduce.py after the run, read by report.py."""
import json
import math
import shlex
import sys
from pathlib import Path

from definitions import ROOT, Experiment

sys.path.insert(0, str(ROOT))
from singlestep.run.folder import atomic_write

# name, command, jobs (parallel runs), starts (launches), final (the final evaluation), epochs (one dict each).
# Optional: evaluations (records of evaluate.py), stopped (the epoch after which the run was stopped for good).
Result = dict
MACHINE = ("commit", "device", "threads", "torch", "torchvision", "python")
NEEDED = ("train_time", "train_robust_acc", "test_acc", "test_robust_acc", "test_images")  # of every epoch


def result_file(results: Path, experiment: Experiment) -> Path:
    return results / experiment.scale / f"{experiment.name}.json"


def read_result(results: Path, experiment: Experiment) -> Result | None:
    """Return the result of `experiment`; None if the file is missing, damaged or from another command."""
    try:
        result = json.loads(result_file(results, experiment).read_text(encoding="utf-8"))
        stopped = result.get("stopped")
        numbers = [record[name] for record in result["epochs"] for name in NEEDED]
        if not stopped and "--final-iters=0" not in experiment.command:
            numbers += [result["final"][name] for name in ("robust_acc", "iters", "restarts", "images")]
        ours, theirs = ({word for word in command.split() if not (stopped and word.startswith("--final-"))}
                        for command in (_command(experiment), result["command"]))
        whole = ours == theirs and len(result["epochs"]) == (stopped or experiment.epochs)
        attacks = {row["attack"] for record in result.get("evaluations", ()) for row in record["attacks"]}
        whole = whole and attacks >= set(filter(None, experiment.attacks.split(",")))
        described = result["starts"] and all(set(MACHINE) <= start.keys() for start in result["starts"])
        return result if whole and described and all(map(math.isfinite, numbers)) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def collect(experiment: Experiment, folder: Path, jobs: int) -> Result:
    """Return the result of a complete run: its numbers, command, versions and hardware."""
    def text(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    starts = json.loads(text("args.json"))["starts"]
    final = None if "--final-iters=0" in experiment.command else json.loads(text("final.json"))
    evaluations = {"evaluations": json.loads(text("evaluation.json"))} if experiment.attacks else {}
    for row in [row for record in evaluations.get("evaluations", ()) for row in record["attacks"]]:
        row.pop("robust_images", None)  # long
    return {"name": experiment.name, "command": _command(experiment), "jobs": jobs,
            "starts": [{key: start[key] for key in MACHINE} for start in starts], "final": final, **evaluations,
            "epochs": [json.loads(line) for line in text("metrics.jsonl").splitlines()]}


def write_result(results: Path, experiment: Experiment, result: Result) -> None:
    """Write `result` as JSON, one line per epoch."""
    path = result_file(results, experiment)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items() if key != "epochs"]
    epochs = ",\n".join(f"  {json.dumps(epoch)}" for epoch in result["epochs"])
    with atomic_write(path) as file:
        file.write(("{\n" + ",\n".join([*head, f' "epochs": [\n{epochs}\n ]']) + "\n}\n").encode())


def _command(experiment: Experiment) -> str:
    return shlex.join(["python", *experiment.command])
