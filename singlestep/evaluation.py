"""evaluate.py and --eval: attack networks, print a table, add a record to evaluation.json."""
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import figures, options, tables
from .autoattack import AutoAttack, library, parts_for
from .checkpoints import Opened, fingerprint, open_network, open_run
from .data import Images, testing
from .methods import MODELS
from .networks import Normalize
from .options import Args, DataSet
from .robustness import PGD, Restart, Result, attack_steps, no_gradient, shown
from .run import folder as folders
from .run.console import Screen, StopSignals, UsageError, duration, one_line_errors, say
from .run.device import (
    NO_ROOM,
    Precision,
    advice_on_failure,
    choose_device,
    describe,
    evaluation_batch,
    memory_format,
    precision_hints,
    too_many_at_once,
)
from .run.distributed import Stop, World
from .run.folder import Folder

# Warn if AutoAttack accuracy is this far below PGD-50-10 accuracy. Our choice: the gap of the two networks in
# docs/accuracy.md is 0.044 and 0.038.
MASKED = 0.08
# Warn if Square breaks more than this fraction of the images that APGD does not. Threshold of AutoAttack's authors.
SURPRISE = 0.002

# Threshold of `batchnorm_mismatch`. Measured once, without a log: at most 0.21 on 13 networks with correct flags (the
# maximum just before a collapse), at least 0.48 with wrong flags.
MISMATCH = 0.33

WORST = "worst case"  # name of the row that counts the images robust to all attacks

LONG = 120  # seconds; a time estimate is printed for attacks that may take longer

HEADER = """\
| attack        | epsilon |  step | images | accuracy | 95% interval  | seconds |
|:--------------|--------:|------:|-------:|---------:|:-------------:|--------:|"""


@dataclass
class Job:
    """The evaluation of one network.

    Attributes:
        opened: the network, in eval mode, on the device.
        images: test images to attack.
        batch_size: size of an evaluation batch.
        clean: the unperturbed result; None before it is computed.
        rows: table rows.
        robust: (attack, epsilon) -> whether each image is robust, bool (N,).
        warnings: warnings about the network.
        unfinished: files of interrupted attacks, to remove once evaluation.json holds their rows.
        record: this evaluation's record in evaluation.json; empty before the first write.
        is_new: an attack was run, so evaluation.json must be written.
        failure: error of the last write of evaluation.json; None if all rows are saved.
        pace: seconds of a forward pass, per image; 0 before it is measured.
    """

    opened: Opened
    images: Images
    batch_size: int
    precision: Precision
    stop: Stop
    screen: Screen
    clean: Result | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    robust: dict[tuple[str, float], Tensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    is_new: bool = False
    failure: OSError | None = None
    pace: float = 0.0


class Evaluated(NamedTuple):
    """The results of one network.

    Attributes:
        folder: the path that evaluate.py was given.
        flags: flags of the network's run; empty without a run.
        rows: rows of the network's table.
        norm: norm of the ball.
        data_set: name of the data set, with "synthetic" for synthetic images.
    """

    folder: Path
    flags: dict[str, Any]
    rows: list[dict[str, Any]]
    norm: str = "l_inf"
    data_set: str = ""

    def by_column(self) -> dict[tuple[str, float, str], dict[str, Any]]:
        """Return (attack, epsilon, norm) -> row."""
        return {(row["attack"], row["epsilon"], "l_inf" if row["attack"] == "clean" else self.norm): row
                for row in self.rows}


def main(args) -> None:
    """Evaluate the networks in evaluate.py's arguments. An error ends the process."""
    with one_line_errors(), StopSignals() as signals, advice_on_failure(signals, NO_ROOM):
        device = choose_device(args)
        world = World.join(device)
        if any(name in options.AUTOATTACK for name in args.attacks):
            library()
            if world.size > 1:
                raise UsageError("--attacks: AutoAttack and its parts are for one process, without torchrun")
        epsilon = args.epsilons[0] if args.epsilons and len(args.epsilons) == 1 else None
        names = ("data_set", "norm", "seed", *options.RUNS)
        flags = {name: getattr(args, name) for name in names} | {"epsilon": epsilon}
        opening = {path: partial(open_run, path, args.which, **flags) for path in args.runs}
        if args.network:
            sys.path.insert(0, os.getcwd())
            opening[args.network] = partial(open_network, args.network, args.weights, args.which, **flags)
        test_images = read_once()
        networks = {path: partial(read, each, args.attacks, args.out, test_images) for path, each in opening.items()}

        def check() -> None:
            for each in [*networks.values()][1:]:  # evaluate_network opens the first network next
                each()

        world.from_main(check)
        found = [evaluate_network(path, each, args, device, Stop(signals, world)) for path, each in networks.items()]
        if world.is_main:
            table, caption = comparison(found, args.by_seed)
            if len(found) > 1:
                say(f"\n{tables.aligned(table)}\n# {caption}")
            data_sets = dict.fromkeys(each.data_set for each in found)
            if len(data_sets) > 1:
                say(f"# warning: the rows are not comparable: the test images differ ({', '.join(data_sets)})")
            tables.write(table, caption, args)
        world.leave()


def evaluate_network(path: str, network: Callable[[], tuple[Opened, Images]], args, device: torch.device,
                     stop: Stop) -> Evaluated:
    """Evaluate a network with evaluate.py's attacks.

    Args:
        path: the path that evaluate.py was given.
        network: function that reads the network and its test images.
    """
    job = open_job(network, device, Precision(args, device), stop, Screen(stop.world.is_main))
    job.batch_size = args.batch_size or job.batch_size
    job.images = job.images[:args.samples]
    epsilons = args.epsilons or (job.opened.args.epsilon,)
    attacks = [(attack, epsilon) for attack in args.attacks
               for epsilon in ((0.0,) if attack == "clean" else epsilons)]
    for values in ({"mean": args.mean, "std": args.std}, *(
            {"epsilon": each, "norm": job.opened.args.norm} for each in epsilons)):
        for hint in options.unit_hints(values):
            job.screen.warn(hint.replace("--epsilon=", "--epsilons="))
    for attack, epsilon in attacks:
        if attack not in options.AUTOATTACK:
            pgd = form_of_pgd(attack, epsilon)
            for hint in options.reach_hints(attack_title(attack, epsilon), pgd.steps, 255 * pgd.alpha, epsilon):
                job.screen.say(f"# {hint}")
    for hint in precision_hints(args, device):
        job.screen.say(f"# {hint}")
    job.warnings = mismatch(job)
    for warning in job.warnings:
        job.screen.warn(warning)
    rows = {} if args.again else stop.world.from_main(lambda: known_rows(job))
    known = [name for name in attacks if name in rows]
    if known:
        job.screen.say(f"# results reused from evaluation.json (to run the attacks again: --again): "
                       f"{'; '.join(attack_title(*name) for name in known)}")
    try:
        with advice_on_failure(stop.signals, f"lower --batch-size (now {job.batch_size})"):
            for attack, epsilon in attacks:
                if (attack, epsilon) in known:
                    job.robust[attack, epsilon] = unpacked(rows[attack, epsilon])
                    add(job, rows[attack, epsilon], measured=False)
                else:
                    measure(job, attack, epsilon)
        for found in worst(job, epsilons):
            add(job, found, measured=False)
    finally:
        warn(job)
    if job.failure:
        raise job.failure
    data_set = ("synthetic " if job.opened.args.dummy else "") + job.opened.dataset.name
    return Evaluated(Path(path), figures.defaults(job.opened.run) if "attack" in job.opened.run else {}, job.rows,
                     job.opened.args.norm, data_set)


def comparison(networks: list[Evaluated], by_seed: bool = False) -> tuple[tables.Table, str]:
    """Return the comparison table of the networks (one column per attack and epsilon) and its caption.

    Networks whose runs differ only in the seed share a row, unless `by_seed`.
    """
    runs, files = [each for each in networks if each.flags], [each for each in networks if not each.flags]
    groups = {**(figures.named(runs, by_seed) if runs else {}), **{str(each.folder): [each] for each in files}}
    found = {column for each in networks for column in each.by_column()}
    attacks = [row["attack"] for each in networks for row in each.rows]
    columns = sorted(found, key=lambda column: (column[0] == WORST, attacks.index(column[0]), *column[1:]))
    heads = [attack_title(attack, epsilon) + ("" if norm == "l_inf" else f", {norm}")
             for attack, epsilon, norm in columns]
    table: tables.Table = [["network", "images", *heads]]
    for title, group in groups.items():
        rows = [each.by_column() for each in group]
        table.append([figures.titled(title, group), figures.span([each.rows[0]["n"] for each in group]),
                      *(accuracy([row[column] for row in rows if column in row]) for column in columns)])
    several = " or mean ± deviation over the seeds" if any(len(group) > 1 for group in groups.values()) else ""
    return table, f"accuracy in % with its 95% interval{several}; epsilon in 1/255"


def accuracy(rows: list[dict[str, Any]]) -> tables.Accuracy:
    """Return a cell of the comparison table: one row's networks under one attack."""
    interval = (100 * rows[0]["low"], 100 * rows[0]["high"]) if len(rows) == 1 else None
    return tables.Accuracy([100 * row["accuracy"] for row in rows], 2, interval)


def evaluate_training(dataset: DataSet, args: Args, signals: StopSignals) -> None:
    """Run --eval.

    Repeat the last-epoch evaluation with the network that --resume names. Then, unless --final-iters is 0, run the
    final evaluation of the same network or, with --final-model=best, of model_best.pth.
    """
    device = choose_device(args)
    world, folder = World.join(device), Folder(args.fname)
    precision, screen = Precision(args, device), Screen(world.is_main, args.quiet)
    recorded, names = options.run_flags(args.fname), ("seed", "epsilon", "norm", *options.RUNS)
    # Flags that the user did not give come from the run's args.json.
    flags = {name: getattr(args, name) for name in names if not recorded or name in args.given}
    flags["data_set"] = dataset

    def opened(path: str | Path, which: str) -> Job:
        return open_job(partial(read, partial(open_run, path, which, **flags)), device, precision, Stop(signals, world),
                        screen, args.batch_size)

    def resumed() -> str | Path:
        trained_on = recorded.get("data_set", dataset.name)
        if trained_on != dataset.name:
            raise UsageError(f"--resume: the run in --fname {args.fname} is on {trained_on}, not {dataset.name}")
        if args.resume != "auto":
            return folder.file("model", int(args.resume) - 1)
        if not folder.names(r"(state|model_\w+)\.pth"):
            raise UsageError(f"--eval: --fname {args.fname} contains no model to evaluate")
        return args.fname

    job = opened(world.from_main(resumed), "last")
    args = replace(args, epsilon=job.opened.args.epsilon, norm=job.opened.args.norm)  # args.json may have been edited
    for hint in options.pgd_hints(args):
        screen.say(f"# {hint}")
    test = job.images
    job.images = test if args.full_test else test[:max(args.test_samples, args.last_samples or len(test))]
    began, epoch = time.perf_counter(), job.opened.epoch
    with advice_on_failure(signals, too_many_at_once(job.batch_size, device)):
        measure_pgd(job, "clean", 0.0)
        fgsm = measure_pgd(job, "fgsm", args.epsilon).metrics()
        pgd = measure_pgd(job, f"pgd-{args.test_iters}-{args.test_restarts}", args.epsilon, args.pgd_alpha).metrics()
        keep(job, {
            "epoch": epoch, "test_loss": pgd["clean_loss"], "test_acc": pgd["clean_acc"],
            "test_robust_loss": pgd["robust_loss"], "test_robust_acc": pgd["robust_acc"],
            "attack_mean": pgd["attack_mean"], "no_gradient": pgd["no_gradient"], "test_images": pgd["images"],
            "fgsm_acc": fgsm["robust_acc"], "test_time": time.perf_counter() - began})
        if args.final_iters:
            best = args.final_model == "best" and world.from_main(folder.file("model", "best").exists)
            network, began = (opened(args.fname, "best") if best else job).opened, time.perf_counter()
            job = replace(job, opened=network, images=test[:args.final_samples], clean=None)
            result = measure_pgd(job, f"pgd-{args.final_iters}-{args.final_restarts}", args.epsilon, args.pgd_alpha)
            keep(job, {"final": {
                "model": "best" if best else "last", "iters": args.final_iters, "restarts": args.final_restarts,
                "alpha": args.pgd_alpha, "epsilon": args.epsilon, "norm": args.norm, "epoch": epoch,
                "seconds": time.perf_counter() - began, **result.metrics()}})
    warn(job)
    if job.failure:
        raise job.failure
    world.leave()


def read_once() -> Callable[[DataSet, str, bool], Images]:
    """Return a version of `data.testing` that reads each data set once."""
    found: dict[str, Images] = {}

    def test_images(dataset: DataSet, data_dir: str, synthetic: bool) -> Images:
        key = json.dumps([dataset.statement(), data_dir, synthetic])
        if key not in found:
            found[key] = testing(dataset, data_dir, synthetic)
        return found[key]

    return test_images


def read(open_it: Callable[[], Opened], attacks: tuple[str, ...] = (), out: str | None = None,
         test_images: Callable[[DataSet, str, bool], Images] = testing) -> tuple[Opened, Images]:
    """Open a network and its test images.

    Check that the results can be saved, and that the attacks and the user's own network fit the images. The returned
    Opened.folder is the folder for evaluation.json: `out`, else the network's folder; Folder(None) if the network's
    folder is not writable.
    """
    opened = open_it()
    folder = Folder(out) if out else opened.folder
    if out:
        folder.require_writable("--out")
        folder.path.mkdir(parents=True, exist_ok=True)
    elif not folder.is_writable():
        why = f": {folder.path} cannot be written" if folder.exists else ""
        opened.notes.append(f"the results will not be saved{why}; to save them: evaluate.py --out=FOLDER")
        folder = Folder(None)
    folders.evaluations(folder)  # raises where the file is damaged, before anything is measured
    for attack in attacks:
        if attack in options.AUTOATTACK:
            opened.notes.extend(parts_for(attack, opened.dataset.classes)[1])
    images = test_images(opened.dataset, opened.args.data_dir, opened.args.dummy)
    if opened.args.model not in MODELS:
        check_outputs(opened, images)
    # The user's functions in the data set may not be picklable: drop them before other processes receive it.
    dataset = replace(opened.dataset, source=opened.dataset.statement()["source"], peak=options.half)
    return opened._replace(folder=folder, dataset=dataset), images


@torch.no_grad()
def check_outputs(opened: Opened, images: Images) -> None:
    """Raise UsageError unless the user's network maps images to one logit per class."""
    x, _ = images.batch(slice(2))
    try:
        shape = tuple(opened.model(x).shape)
    except Exception as error:  # the user's code may raise any exception
        raise UsageError(f"--network {opened.source} fails on images of shape {tuple(x.shape)}: "
                         f"{type(error).__name__}: {error}") from None
    if shape != (len(x), opened.dataset.classes):
        raise UsageError(f"--network {opened.source} maps images of shape {tuple(x.shape)} to {shape}, not to "
                         f"{(len(x), opened.dataset.classes)}: the logits of {opened.dataset.name}")


def open_job(network: Callable[[], tuple[Opened, Images]], device: torch.device, precision: Precision,
             stop: Stop, screen: Screen, batch_size: int = 128) -> Job:
    """Read the network and its test images on rank 0, print the network's notes, and move both to the device.

    batch_size: training batch size, which bounds the evaluation batch (see `evaluation_batch`).
    """
    stop.signals.deferred = False
    opened, images = stop.world.from_main(network)
    stop.signals.deferred = True
    for note in opened.notes:
        screen.say(f"# {opened.source}: {note}")
    layout = memory_format(opened.model, device)
    opened.model.to(device).to(memory_format=layout)
    images = images.to(device, layout)
    at_once = evaluation_batch(batch_size, opened.model, images.batch(slice(2))[0])
    return Job(opened, images, at_once, precision, stop, screen)


def add(job: Job, found: dict[str, Any], measured: bool = True) -> None:
    """Add a row, write evaluation.json if it lacks rows, and print the row."""
    job.rows.append(found)
    job.is_new |= measured
    if job.is_new:
        keep(job, {})
    if job.screen.shown:
        title = job.opened.source + (f", norm {job.opened.args.norm}" if job.opened.args.norm != "l_inf" else "")
        head = f"\n{title}\n\n{HEADER}\n" if len(job.rows) == 1 else ""
        say(head + line(found), needed=not job.opened.folder.exists or job.failure is not None)


def keep(job: Job, found: dict[str, Any]) -> None:
    """Write all rows so far, and the entries `found`, to this evaluation's record in evaluation.json, on rank 0 only.

    After a failed write, as on a full disk, the next call writes all rows.
    """
    if not (job.stop.world.is_main and job.opened.folder.exists):
        return
    record = {**(job.record or about(job)), "attacks": job.rows, **found, "warnings": job.warnings + suspicions(job)}
    try:
        job.record = folders.add_evaluation(job.opened.folder, record, job.record)
    except OSError as error:
        job.failure = error
        job.screen.warn(f"evaluation.json cannot be written: {error.strerror}")
        return
    job.failure = None
    while job.unfinished:
        job.unfinished.pop().unlink(missing_ok=True)


def about(job: Job) -> dict[str, Any]:
    """Return the entries of a record that are known before any attack."""
    opened = job.opened
    return {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "file": opened.source, **conditions(job),
            "batch_size": job.batch_size, "notes": opened.notes,
            **describe(job.images.labels.device, job.stop.world.size)}


def conditions(job: Job) -> dict[str, Any]:
    """Return the settings that determine an attack's result: network, images, norm, seed and precision.

    Results in records with equal settings are reused. (AutoAttack's random numbers also depend on the batch size.)
    """
    return {"network": fingerprint(job.opened.model), **parameters(job.opened), "seed": job.opened.args.seed,
            "samples": len(job.images), "precision": job.precision.name}


def known_rows(job: Job) -> dict[tuple[str, float], dict[str, Any]]:
    """Return the newest rows in evaluation.json of attacks on this network, (attack, epsilon) -> row.

    Rows without `robust_images` (older versions) are ignored: the worst-case row needs to know which images are robust.

    Raises:
        UsageError: a row is damaged.
    """
    known, same = {}, json.loads(json.dumps(conditions(job)))
    for record in folders.evaluations(job.opened.folder):
        if any(record.get(name) != value for name, value in same.items()):
            continue
        try:
            for row in record.get("attacks", ()):
                of_network = row["n"] == len(job.images) and row.get("file") in (None, record["file"])
                if "robust_images" in row and of_network and row["step"] == step_of(row["attack"], row["epsilon"]):
                    unpacked(row), line(row)
                    known[row["attack"], row["epsilon"]] = row
        except (AttributeError, KeyError, TypeError, ValueError):
            raise folders.damaged_evaluations(job.opened.folder) from None
    return known


def step_of(attack: str, epsilon: float) -> float | None:
    """Return the step size of evaluate.py's attack in 1/255; None for clean and AutoAttack."""
    pgd = None if attack in options.AUTOATTACK else form_of_pgd(attack, epsilon)
    return 255 * pgd.alpha if pgd and pgd.restarts else None


def packed(robust: Tensor) -> str:
    """Return robust, bool (N,), in hexadecimal: two digits for eight images, the first image in the highest bit."""
    return np.packbits(robust.cpu().numpy()).tobytes().hex()


def unpacked(row: dict[str, Any]) -> Tensor:
    """Return whether each image is robust, bool (N,), from a row of evaluation.json. Raises ValueError on damage."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["robust_images"]), dtype=np.uint8))
    robust = bits[:row["n"]].astype(bool)
    if len(bits) != -(-row["n"] // 8) * 8 or robust.sum() != row["robust"]:
        raise ValueError
    return torch.from_numpy(robust)


def warn(job: Job) -> None:
    """Print the warnings that the results cause."""
    for warning in suspicions(job):
        job.screen.warn(warning)


def parameters(opened: Opened) -> dict[str, Any]:
    """Return a record's entries about the network, the data set and the normalization."""
    normalize = getattr(opened.model, "normalize", None)
    constants = {name: getattr(normalize, name).flatten().tolist() for name in ("mean", "std")
                 if isinstance(normalize, Normalize)}
    of_network = options.NETWORK if opened.args.model in MODELS else ("model", "mean", "std")
    names = ("data_set", "dummy", "norm", *of_network)
    return {**{name: getattr(opened.args, name) for name in names}, **constants}


def measure(job: Job, attack: str, epsilon: float) -> None:
    """Attack the images, epsilon in 1/255, and add a row."""
    if attack not in options.AUTOATTACK:
        measure_pgd(job, attack, epsilon)
        return
    if not job.clean:
        attacked(job, "clean", form_of_pgd("clean", 0.0))  # raises UsageError for non-finite outputs
    robust, seconds, more = auto_attack(job, attack, epsilon)
    job.robust[attack, epsilon] = robust
    add(job, {**row(attack, epsilon, int(robust.sum()), len(robust), seconds), **more, "robust_images": packed(robust)})


def measure_pgd(job: Job, attack: str, epsilon: float, alpha: float | None = None) -> Result:
    """Attack the images with clean, fgsm, cw or PGD, and add a row.

    epsilon and alpha (the step size, default: epsilon / 4) are in 1/255.
    """
    pgd = form_of_pgd(attack, epsilon, alpha, job.opened.args.seed, job.opened.args.norm)
    title = attack_title(attack, epsilon)
    announce(job, title, epsilon, 3 * pgd.steps * pgd.restarts or 1)
    began = time.perf_counter()
    result = attacked(job, title, pgd)
    robust = result.robust.bool()
    job.robust[attack, epsilon] = robust
    found = {**row(attack, epsilon, int(robust.sum()), len(robust), time.perf_counter() - began),
             "step": 255 * pgd.alpha if pgd.restarts else None, "file": job.opened.source,
             "robust_images": packed(robust)}
    if pgd.restarts:
        found["no_gradient"] = result.metrics()["no_gradient"]
    add(job, found)
    return result


def attack_title(attack: str, epsilon: float) -> str:
    """Return the name of an attack with its epsilon in 1/255, for notes and column titles."""
    return attack if attack == "clean" else f"{attack}, epsilon {epsilon:g}"


def announce(job: Job, title: str, epsilon: float, cost: float) -> None:
    """Print an estimate of the attack's duration if it exceeds LONG seconds.

    cost: forward passes for an image that stays robust; a backward pass counts 2.
    """
    if not job.screen.shown:
        return
    job.pace = job.pace or pace(job)
    robust = min((found.double().mean().item() for (_, size), found in job.robust.items() if size <= epsilon),
                 default=1.0)
    seconds = cost * robust * len(job.images) * job.pace / job.stop.world.size
    if seconds > LONG:
        job.screen.say(f"# {title}: may take {duration(seconds)}")


def pace(job: Job) -> float:
    """Measure the seconds of a forward pass, per image."""
    x, _ = job.images.batch(slice(job.batch_size))
    began = 0.0
    for _ in range(2):  # the first forward pass also initializes the device
        began = time.perf_counter()
        job.precision.float32_logits(job.opened.model, x).sum().item()
    return (time.perf_counter() - began) / len(x)


def form_of_pgd(attack: str, epsilon: float, alpha: float | None = None, seed: int = 0, norm: str = "l_inf") -> PGD:
    """Return the attack named clean, fgsm, cw, pgd-STEPS-RESTARTS or pgd-STEPS-RESTARTS-SIZE.

    epsilon, alpha (the step size of pgd and cw, default: epsilon / 4) and SIZE (overrides alpha) are in 1/255.
    """
    size, step = epsilon / 255, (epsilon / 4 if alpha is None else alpha) / 255
    if attack == "clean":
        return PGD(0.0, 0.0, 0, 0)
    if attack == "fgsm":
        return PGD(size, size, 1, 1, seed, init="zero", norm=norm)
    if attack == "cw":
        return PGD(size, step, 50, 10, seed, loss="cw", norm=norm)
    _, steps, restarts, *own = attack.split("-")
    return PGD(size, float(own[0]) / 255 if own else step, int(steps), int(restarts), seed, norm=norm)


def attacked(job: Job, title: str, attack: PGD) -> Result:
    """Return the result of an attack on the images. The unperturbed result is computed once."""
    begun = Restart(0, job.clean.unperturbed()) if job.clean and attack.restarts else None
    events = attack_steps(job.opened.model, job.images, attack, job.batch_size, job.precision, job.stop.world, begun)
    for restart in shown(events, job.screen, title, attack.restarts, job.stop):
        job.clean = job.clean or restart.result
        if not job.clean.clean_loss.isfinite().all():
            raise UsageError(f"the network in {job.opened.source} produces non-finite outputs")
    return restart.result


def auto_attack(job: Job, attack: str, epsilon: float) -> tuple[Tensor, float, dict[str, Any]]:
    """Run AutoAttack or one of its parts. Returns robust (N,), seconds and extra entries of the row."""
    parts, _ = parts_for(attack, job.opened.dataset.classes)
    model, images, seed, folder = job.opened.model, job.images, job.opened.args.seed, job.opened.folder
    file = folder.path / f".{attack}-{epsilon:g}.json" if folder.exists else None
    key = {"network": fingerprint(model), **parameters(job.opened), "attack": attack, "epsilon": epsilon,
           "images": len(images), "seed": seed, "batch_size": job.batch_size}
    run = AutoAttack(model, images, parts, epsilon / 255, seed, job.batch_size, job.precision, file, key,
                     job.opened.dataset.classes, job.stop.alone, job.opened.args.norm)
    announce(job, f"{attack}, epsilon {epsilon:g}", epsilon, run.passes_left / max(1, len(run.left)))
    with job.screen.progress(attack, 1, "call") as bar:
        for passes in run.steps():
            bar.update(passes, run.passes_left)
            number = f" {run.part} ({1 + parts.index(run.part)}/{len(parts)})" if len(parts) > 1 else ""
            bar.tell(f"{attack}{number}, epsilon {epsilon:g}, {100 * len(run.left) / len(images):.1f}% still robust")
            job.stop.together()
    if file:
        job.unfinished.append(file)
    robust = torch.zeros(len(images), dtype=torch.bool)
    robust[run.left] = True
    return robust, run.seconds, {"parts": run.broken, "no_gradient": run.no_gradient}


def row(attack: str, epsilon: float, robust: int, n: int, seconds: float | None = None) -> dict[str, Any]:
    """Return a table row: `robust` of n images, with Wilson's 95% interval. Epsilon is in 1/255."""
    from scipy.stats import binomtest  # takes long to import

    interval = binomtest(robust, n).proportion_ci(0.95, method="wilson")
    return {"attack": attack, "epsilon": epsilon, "n": n, "robust": robust, "accuracy": robust / n,
            "low": float(interval.low), "high": float(interval.high), "seconds": seconds, "step": None}


def worst(job: Job, epsilons: tuple[float, ...]) -> list[dict[str, Any]]:
    """Return one row per epsilon for the images robust to all attacks; none with a single attack."""
    rows = []
    for epsilon in epsilons:
        left = [flags.cpu() for (_, size), flags in job.robust.items() if size == epsilon]
        if len(left) > 1:
            rows.append(row(WORST, epsilon, int(torch.stack(left).all(dim=0).sum()), len(left[0])))
    return rows


def suspicions(job: Job) -> list[str]:
    """Return warnings if the results suggest that an attack is too weak or that gradients are masked."""
    warnings = []
    for epsilon in dict.fromkeys(row["epsilon"] for row in job.rows):
        rows = {row["attack"]: row for row in job.rows if row["epsilon"] == epsilon}
        n = len(job.images)
        pgd = min((row for name, row in rows.items() if name.startswith("pgd-")), default=None,
                  key=lambda row: (row["attack"] != "pgd-50-10", row["robust"]))
        if pgd and "autoattack" in rows and (gap := pgd["accuracy"] - rows["autoattack"]["accuracy"]) > MASKED:
            warnings.append(f"at epsilon {epsilon:g}, AutoAttack accuracy is {100 * gap:.1f} points below "
                            f"{pgd['attack'].upper()} accuracy: gradients may be masked")
        square = rows.get("autoattack", {}).get("parts", {}).get("square", 0)
        apgd = [job.robust[name, epsilon].cpu() for name in ("apgd-ce", "apgd-t") if name in rows]
        if "square" in rows and apgd:
            square = max(square, int((torch.stack(apgd).all(dim=0) & ~job.robust["square", epsilon].cpu()).sum()))
        if square > SURPRISE * n:
            warnings.append(f"at epsilon {epsilon:g}, {square} of {n} images are misclassified under Square (an attack "
                            f"without gradients), but not under APGD: gradients may be masked")
        for name, row in rows.items():
            fgsm = rows.get("fgsm", row)
            same = (row["n"], row.get("file")) == (fgsm["n"], fgsm.get("file"))
            if row["step"] is not None and same and row["robust"] > fgsm["robust"]:
                warnings.append(f"at epsilon {epsilon:g}, {name} accuracy ({100 * row['accuracy']:.2f}%) is above fgsm "
                                f"accuracy ({100 * fgsm['accuracy']:.2f}%): {name} is too weak; use more steps or "
                                f"another step size")
            shares = row.get("no_gradient", 0.0)
            shares = shares if isinstance(shares, dict) else {name: shares}
            for part, share in shares.items():
                warnings += no_gradient(f"at epsilon {epsilon:g}, {part}", share)
    return warnings


def mismatch(job: Job) -> list[str]:
    """Return a warning if the inputs of a BatchNorm layer do not fit its running statistics.

    The cause may be a wrong normalization, block or data set. Networks whose run recorded these flags are not checked.
    """
    run, args = job.opened.run, job.opened.args
    recorded = {**{name: options.FLAGS[name].default for name in options.NETWORK}, **run}
    if run and all(recorded[name] == getattr(args, name) for name in ("data_set", *options.NETWORK)):
        return []
    x, _ = job.images.batch(slice(512))
    distance = batchnorm_mismatch(job.opened.model, x)
    return [] if distance < MISMATCH else [
        f"the inputs of a BatchNorm layer differ from its running statistics by {distance:.2f} (0: equal; under "
        f"{MISMATCH:g}: normal): the normalization (--mean, --std), the block (--shortcut, --block) or the data set "
        f"may be wrong"]


@torch.no_grad()
def batchnorm_mismatch(model: nn.Module, x: Tensor) -> float:
    """Return the largest distance of a BatchNorm layer's inputs from its running statistics, for x (B, 3, H, W).

    Distance of a channel: the length of ((mean - running mean) / running deviation, log(deviation / running
    deviation)). Distance of a layer: the first quartile over its channels (our choice). Every layer normalizes with
    the statistics of this batch, as in training, so that a layer's distance does not increase those of later layers.
    """
    distances: list[Tensor] = []

    def compare(layer: nn.BatchNorm2d, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(inputs[0].float(), dim=(0, 2, 3))
        running_mean, running_var = (layer.get_buffer(f"running_{part}") for part in ("mean", "var"))
        running = (running_var + layer.eps).sqrt()
        stretch = ((deviation.square() + layer.eps).sqrt() / running).log()
        distances.append(torch.hypot((mean - running_mean) / running, stretch).quantile(0.25))
        return F.batch_norm(inputs[0], None, None, layer.weight, layer.bias, training=True, eps=layer.eps)

    hooks = [layer.register_forward_hook(compare) for layer in model.modules()
             if type(layer) is nn.BatchNorm2d and layer.running_mean is not None]  # a subclass may compute more
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(distances).max().item() if distances else 0.0


def line(row: dict[str, Any]) -> str:
    """Return a row of the table, in Markdown."""
    epsilon = "" if row["attack"] == "clean" else f"{row['epsilon']:g}"
    step = "" if row["step"] is None else f"{row['step']:.4g}"
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
    interval = f"{100 * row['low']:.2f}-{100 * row['high']:.2f}%"
    return (f"| {row['attack']:13} | {epsilon:>7} | {step:>5} | {row['n']:>6} | {100 * row['accuracy']:>7.2f}% | "
            f"{interval:^13} | {seconds:>7} |")


if __name__ == "__main__":
    main(options.parse_evaluation("Evaluate networks on clean images, and under FGSM, PGD, CW and AutoAttack."))
