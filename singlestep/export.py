"""export.py: write a network as a safetensors file with a model card, or in RobustBench's layout."""
import inspect
import io
import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from . import collapse, networks, options
from .checkpoints import EXPORTED, Opened, fingerprint, open_run
from .methods import METHODS, MODELS
from .options import Args
from .run.console import UsageError, one_line_errors, say
from .run.folder import atomic_write, evaluations, read_records
from .run.state import read_metadata

# Fields to export from the records of a run's launches.
STARTED = ("commit", "python", "torch", "torchvision", "device", "threads", "processes", "epoch")
PATHS = ("data_dir", "fname")  # flags that are paths of the run's machine
ROBUSTBENCH = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100"}
THREATS = {"l_inf": "Linf", "l_2": "L2"}  # RobustBench's names of the norms


def main(args) -> None:
    """Export the network in export.py's arguments. An error ends the process."""
    with one_line_errors():
        flags = {name: getattr(args, name) for name in ("data_set", *options.NETWORK)}
        opened = open_run(args.run, args.which, **flags)
        for note in opened.notes:
            say(f"# {opened.source}: {note}")
        files = for_robustbench(opened, args) if args.to.endswith("/") else as_safetensors(opened, args)
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(content)
            say(f"wrote {path}")


# The metadata of a network


def facts(opened: Opened) -> dict[str, Any]:
    """Return the metadata of an exported file, as a dict. A file that is exported again keeps its metadata, with the
    given flags of the network and new accuracies.

        data_set, statement    as in args.json
        starts      for each launch, the fields STARTED of args.json, and the command without paths and --like
        args        flags of the run, without paths; without a run, the flags of the network only
        network     epoch: during or after which the network was saved, counted from 0; collapsed: whether the run was
                    in collapse after it; each None if unknown
        results     `collapse.summary` of the run
        accuracy    rows of `accuracy`
    """
    exported = read_metadata(Path(opened.source)).get(EXPORTED)
    if exported is not None:
        known, built = json.loads(exported), json.loads(json.dumps(as_built(opened).flags()))
        flags = {**known["args"], **{name: built[name] for name in options.NETWORK}}
        same = all(flags[name] == value for name, value in known["args"].items())  # else they are another network's
        return {**known, "args": flags, "accuracy": accuracy(opened, known=known["accuracy"] if same else ())}
    history = read_history(opened)
    epoch = epoch_of(opened, history)
    record = next((record for record in history if record["epoch"] == epoch), None)
    states = dict(zip((record["epoch"] for record in history), collapse.collapsed(history)))
    names = options.FLAGS.keys() - PATHS if opened.run else options.NETWORK
    flags = {name: value for name, value in as_built(opened).flags().items() if name in names}
    return {"data_set": opened.dataset.name, "statement": opened.dataset.statement(), "args": flags,
            "starts": read_starts(opened), "network": {"epoch": epoch, "collapsed": states.get(epoch)},
            "results": collapse.summary(history),
            "accuracy": accuracy(opened, record, final_evaluation(opened, history, epoch))}


def read_history(opened: Opened) -> list[dict[str, Any]]:
    """Return the records of the run's epochs that were evaluated."""
    try:
        return [record for record in read_records(opened.folder) if "test_robust_acc" in record] if opened.run else []
    except ValueError:
        raise UsageError(f"{opened.folder.path / 'metrics.jsonl'} is damaged: repair it, or move it away") from None


def read_starts(opened: Opened) -> list[dict[str, Any]]:
    """Return the records of launches in args.json, without paths, with --like in commands spelled out."""
    if not opened.run:
        return []
    starts = json.loads((opened.folder.path / "args.json").read_text(encoding="utf-8")).get("starts", [])
    return [{**{name: start[name] for name in STARTED if name in start},
             "command": spelled_out(opened, without_paths(start.get("command", [])))} for start in starts]


def spelled_out(opened: Opened, command: list[str]) -> list[str]:
    """Return a command in which --like is replaced by the flags that it stands for, each number with all digits."""
    if not any(word.partition("=")[0] == "--like" for word in command):
        return command
    kept = without(command, ["--like"])
    given = {word.partition("=")[0] for word in kept}
    flags = options.repeated(options.run_flags(opened.folder.path), opened.dataset)
    return [*kept, *(exact(name, value) for name, value in flags.items()
                     if options.option(name) not in given and value is not False and value is not None)]


def exact(name: str, value: Any) -> str:
    """Return a flag as a word of the command line, with all digits of its value."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return options.option(name) + ("" if value is True else f"={','.join(map(str, values))}")


def without_paths(command: list[str]) -> list[str]:
    """Return a command without the flags in PATHS, which are written --flag=VALUE or --flag VALUE."""
    return without(command, [options.option(name) for name in PATHS])


def without(command: list[str], names: Iterable[str]) -> list[str]:
    """Return a command without these flags, which are written --flag=VALUE or --flag VALUE."""
    kept, words = [], iter(command)
    for word in words:
        if word in names:
            next(words, None)
        elif word.partition("=")[0] not in names:
            kept.append(word)
    return kept


def epoch_of(opened: Opened, history: list[dict[str, Any]]) -> int | None:
    """Return the epoch, counted from 0, during or after which the network was saved; None if unknown."""
    best = [record["epoch"] for record in history if record.get("best")]
    healthy = [record["epoch"] for record in history if not record.get("collapsed")]
    named = {"model_best.pth": best, "model_healthy.pth": healthy}.get(Path(opened.source).name)
    if named is None:
        return opened.epoch
    return named[-1] if named else None


def as_built(opened: Opened) -> Args:
    """Return the run's arguments, with the normalization and the final norm of the loaded network."""
    model = opened.model
    constants = {name: model.get_buffer(f"normalize.{name}").flatten().numpy() for name in ("mean", "std")}
    shortest = {name: tuple(float(str(value)) for value in values) for name, values in constants.items()}
    bare = isinstance(model, networks.PreActResNet) and model.bn is None
    return replace(opened.args, **shortest, no_final_norm=bare)


def final_evaluation(opened: Opened, history: list[dict[str, Any]], epoch: int | None) -> list[tuple]:
    """Return (attack, epsilon, step, n, robust) of the final evaluation; [] if it was of another epoch's network."""
    file, args = opened.folder.path / "final.json", opened.args
    if not history or not file.exists():
        return []
    try:
        final = json.loads(file.read_text(encoding="utf-8"))
        best = [record["epoch"] for record in history if record.get("best")]
        evaluated = best[-1:] if final["model"] == "best" else [history[-1]["epoch"]]
        n, pgd = final["images"], f"pgd-{final['iters']}-{final['restarts']}"
        epsilon, step = final.get("epsilon", args.epsilon), final.get("alpha", args.pgd_alpha)
        rows = [("clean", 0.0, None, n, round(n * final["clean_acc"])),
                (pgd, epsilon, step, n, round(n * final["robust_acc"]))]
        return rows if evaluated == [epoch] else []
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{file} is damaged: repair it, or move it away") from None


def accuracy(opened: Opened, record: dict[str, Any] | None = None, final: Iterable[tuple] = (),
             known: Iterable[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Return one row for each attack that the run or evaluate.py has run on this network, and for the worst case.

    Args:
        record: the run's record of the epoch of this network.
        final: rows of `final_evaluation`.
        known: rows in the metadata of the network's file.

    If an attack was measured several times, its row is the measurement on the most images. epsilon and step (the step
    size) are in 1/255; `robust` counts the robust images among n.
    """
    rows: dict[tuple, dict[str, Any]] = {}

    def add(norm: str, attack: str, epsilon: float, step: float | None, n: int, robust: int) -> None:
        key = (norm, attack, epsilon, step)
        if n >= rows.get(key, {"n": 0})["n"]:
            rows[key] = dict(norm=norm, attack=attack, epsilon=epsilon, step=step, n=n, robust=robust)

    for row in known:
        add(**row)
    args = opened.args
    norm = args.norm
    if record and "test_images" in record:
        n, pgd = record["test_images"], f"pgd-{args.test_iters}-{args.test_restarts}"
        add(norm, "clean", 0.0, None, n, round(n * record["test_acc"]))
        if "fgsm_acc" in record:
            add(norm, "fgsm", args.epsilon, args.epsilon, n, round(n * record["fgsm_acc"]))
        add(norm, pgd, args.epsilon, args.pgd_alpha, n, round(n * record["test_robust_acc"]))
    for evaluated in final:
        add(norm, *evaluated)
    network = fingerprint(opened.model)
    for each in evaluations(opened.folder):
        for row in each.get("attacks", []) if each.get("network") == network else []:
            add(each.get("norm", "l_inf"), *(row[name] for name in ("attack", "epsilon", "step", "n", "robust")))
    return list(rows.values())


# The files


def as_safetensors(opened: Opened, args) -> dict[Path, bytes]:
    """Return the content of FILE.safetensors and of FILE.md, its model card."""
    known, weights = facts(opened), opened.model.state_dict()
    if args.half:
        weights = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
        if not all(value.isfinite().all() for value in weights.values()):
            raise UsageError(f"--half: {opened.source} has weights beyond float16's range: do not use --half")
    path = Path(args.to)
    return {path: save(weights, {"format": "pt", EXPORTED: json.dumps(known)}),
            path.with_suffix(".md"): card(known, opened, path.name, args.half).encode()}


def card(known: dict[str, Any], opened: Opened, file: str, half: bool) -> str:
    """Return a model card of the Hugging Face Hub."""
    run, short = as_built(opened), {each.name: short for short, each in options.DATA_SETS.items()}
    network = options.as_flags({name: getattr(run, name) for name in ("model", *MODELS[run.model].values())})
    data = [] if run.dummy else ["datasets:", f"- {short.get(run.data_set, run.data_set)}"]
    lines = [
        "---", "library_name: pytorch", "pipeline_tag: image-classification", "tags:", "- adversarial-robustness",
        "- adversarial-training", *data, "metrics:", "- accuracy",
        "---", "", f"# {title(opened)}", ""]
    if known["network"]["collapsed"]:
        lines += ["**Catastrophic overfitting**: accuracy under multi-step attacks has collapsed; accuracy under FGSM "
                  "has not.", ""]
    if known["accuracy"]:
        lines += ["| attack | norm | epsilon, 1/255 | step size, 1/255 | test images | correct |", f"|{6 * ' --- |'}"]
        lines += map(table_row, known["accuracy"])
        lines += ["", *(["Measured before the weights were rounded to float16.", ""] if half else [])]
    lines += [
        "## Use", "", "```python", "from singlestep import load_run", "", f'model, args = load_run("{file}")', "```",
        "", "The network maps images in [0, 1], of shape (N, 3, H, W), to logits.", "",
        f"* Network: `{network}`, {'float16' if half else 'float32'}",
        f"* Normalization: `{options.as_flags({'mean': run.mean, 'std': run.std})}`"]
    if opened.run:
        lines += ["", "## Training", "", *training(known, run)]
    return "\n".join(lines) + "\n"


def table_row(row: dict[str, Any]) -> str:
    """Return a row of the card's table."""
    step = "" if row["step"] is None else f"{row['step']:g}"
    share = row["robust"] / row["n"]
    return (f"| {row['attack']} | {row['norm']} | {row['epsilon']:g} | {step} | {row['n']:,} | {row['robust']:,} "
            f"({share:.1%}) |")


def title(opened: Opened) -> str:
    """Return a title: the network, the data set and, if the run is known, the method."""
    run = opened.args
    name = f"{run.model} for {'synthetic images' if run.dummy else run.data_set}"
    ball = f"epsilon {run.epsilon:g}/255" + ("" if run.norm == "l_inf" else f" in {run.norm}")
    return f"{name}, trained with {run.method or run.attack} at {ball}" if opened.run else name


def training(known: dict[str, Any], run: Args) -> list[str]:
    """Return the lines of a card about the run."""
    method = options.as_flags({**options.in_effect(run), "norm": run.norm})
    lines = [f"* Method: `{method}`", f"* Seed: {run.seed}"]
    if known["network"]["epoch"] is not None:
        lines.append(f"* Weights of epoch {known['network']['epoch'] + 1} of {run.epochs}")
    results = known["results"]
    if results["best_robust_acc"] is not None:
        first = results["collapse_epoch"]
        fell = "no collapse" if first is None else f"collapse in epoch {first + 1}"
        lines.append(f"* PGD accuracy over the run: best {results['best_robust_acc']:.1%}, last "
                     f"{results['last_robust_acc']:.1%}; {fell}")
    for start in known["starts"]:
        lines += [f"* Command: `python {shlex.join(start['command'])}`",
                  f"* Commit {start.get('commit')}, Python {start.get('python')}, PyTorch {start.get('torch')}, "
                  f"{start.get('device')}"]
    return lines


LOADER = '''"""{title}.

To submit the network to RobustBench, copy this file to robustbench/model_zoo/architectures, and add ENTRY to the
dict of {threat} in robustbench/model_zoo/{data_set}.py. To load the network before that, run in this folder:

    from {name} import ENTRY
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.utils import load_model

    model_dicts[BenchmarkDataset("{data_set}")][ThreatModel.{threat}].update([ENTRY])
    model = load_model("{name}", model_dir="models", dataset="{data_set}", threat_model="{threat}")
"""
{source}


def network() -> {model}:
    return {model}({keywords})


ENTRY = ("{name}", {{"model": network, "gdrive_id": ""}})
'''


def for_robustbench(opened: Opened, args) -> dict[Path, bytes]:
    """Return the files that RobustBench's guide to new models requires: weights, JSON card, and the network's code."""
    run = as_built(opened)
    if run.data_set not in ROBUSTBENCH:
        raise UsageError(f"--to={args.to}: RobustBench has {' and '.join(ROBUSTBENCH)}, not {run.data_set}")
    data_set, threat = ROBUSTBENCH[run.data_set], THREATS[run.norm]
    name = args.name or re.sub(r"\W", "_", f"{run.method or run.attack}_{run.model}" if opened.run else run.model)
    keywords = {"num_classes": opened.dataset.classes, "mean": run.mean, "std": run.std,
                **run.keywords(MODELS[run.model])}
    code, _, _ = inspect.getsource(networks).partition("\n\ndef new_network")
    code = "".join(line for line in code.splitlines(True) if not line.startswith("from ."))
    loader = LOADER.format(name=name, title=title(opened), data_set=data_set, threat=threat, model=run.model,
                           source=code.partition('"""\n')[2].rstrip(),
                           keywords=", ".join(f"{keyword}={value!r}" for keyword, value in keywords.items()))
    weights = io.BytesIO()
    torch.save(opened.model.state_dict(), weights)
    entry = json.dumps(leaderboard_entry(opened, run, data_set), indent=2) + "\n"
    folder = Path(args.to)
    return {folder / f"{name}.py": loader.encode(),
            folder / f"models/{data_set}/{threat}/{name}.pt": weights.getvalue(),
            folder / f"model_info/{data_set}/{threat}/{name}.json": entry.encode()}


def leaderboard_entry(opened: Opened, run: Args, data_set: str) -> dict[str, Any]:
    """Return the entries of RobustBench's JSON card; accuracies are strings, in %. Print what the user has to add."""
    if run.dummy:
        say("# warning: this network was trained on synthetic images: do not submit it to RobustBench")
    found = {row["attack"]: row for row in facts(opened)["accuracy"]
             if row["norm"] == run.norm and row["epsilon"] in (0.0, run.epsilon)}
    measured = {attack: f"{100 * row['robust'] / row['n']:.2f}" for attack, row in found.items()}
    say("# fill in the JSON card: name, authors, venue")
    if "autoattack" not in found:
        say("# AutoAttack accuracy is missing; to measure it: python evaluate.py "
            f"{opened.folder.path} --attacks=clean,autoattack")
    source = METHODS[run.method].source if run.method else ""
    link = f"https://arxiv.org/abs/{source.removeprefix('arXiv ')}" if source.startswith("arXiv") else ""
    return {"link": link, "name": "", "authors": "", "additional_data": False, "number_forward_passes": 1,
            "dataset": data_set, "venue": "", "architecture": run.model,
            "eps": f"{run.epsilon:g}/255" if run.norm == "l_inf" else f"{run.epsilon / 255:.3g}",
            "clean_acc": measured.get("clean"), "reported": measured.get("autoattack"),
            "autoattack_acc": measured.get("autoattack")}


if __name__ == "__main__":
    main(options.parse_export("Export a network: a safetensors file with a model card, or a folder for RobustBench."))
