"""One run, from top to bottom.

The training scripts call `main`; `train` does the same for a network and images of your own. The other functions are
the parts of a run, roughly in the order of their calls.
"""
import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import attacks, collapse, evaluation, objectives, options, robustness
from .attacks import Step
from .checkpoints import fingerprint, load_network
from .data import Augmentation, Images, load
from .methods import ATTACKS, OBJECTIVES
from .networks import new_network
from .options import Args, DataSet
from .robustness import PGD, Restart, Result
from .run import console
from .run import folder as folders
from .run import state as states
from .run.console import Failure, Progress, Screen, Stopped, StopSignals, UsageError, one_line_errors
from .run.device import (
    NO_ROOM,
    Compiled,
    Precision,
    advice_on_failure,
    choose_device,
    describe,
    evaluation_batch,
    kernel_search,
    memory_format,
    peak_memory,
    precision_hints,
    seed_everything,
    too_many_at_once,
)
from .run.distributed import Stop, World
from .run.folder import EventFiles, Folder
from .run.state import Average, Checkpoint, State, named_sums

# First integer of every seed key, one for each purpose of random numbers; 3 is robustness.STARTS.
ORDER, STEP, WATCH, WEIGHTS = 0, 1, 2, 4

WATCHED = 128  # test images on which an epoch's input gradients are compared

# With several processes, check for a stop signal every N steps or seconds, whichever is sooner, and at an epoch's last
# step. (torchrun kills its processes 30 seconds after SIGTERM.)
STOP_STEPS, STOP_SECONDS = 20, 5

TIMED_STEPS = 20  # print a time estimate after this many steps


@dataclass(frozen=True)
class Run:
    """Everything a run needs. Only `state` changes.

    Attributes:
        network: network for attacks, compiled with --compile.
        forward: network for the loss: `network` or, with several processes, its DistributedDataParallel.
        attack, objective: functions of attacks.py and objectives.py, with their keywords.
        alpha: step size of the attack in pixel units; None if the attack has none.
        schedule, momentum: time in epochs -> learning rate, momentum.
        train, test: training and test images.
        held_out: validation images, on which the best network is chosen; may be empty.
    """

    args: Args
    state: State
    folder: Folder
    world: World
    signals: StopSignals
    network: nn.Module
    forward: nn.Module
    attack: Callable[..., Tensor]
    objective: Callable[..., tuple[Tensor, Tensor]]
    alpha: float | None
    schedule: Callable[[float], float]
    momentum: Callable[[float], float]
    augmentation: Augmentation
    train: Images
    held_out: Images
    test: Images
    screen: Screen = field(default_factory=Screen)
    event_files: EventFiles | None = None
    classes: int = 10

    @property
    def steps(self) -> int:
        """Number of training steps in an epoch; the last batch may be smaller."""
        return math.ceil(len(self.train) / self.args.batch_size)

    @property
    def replays(self) -> int:
        """Number of training steps on each batch."""
        flag = ATTACKS[self.args.attack].replays
        return getattr(self.args, flag) if flag else 1

    @cached_property
    def update(self) -> Callable[..., None] | None:
        """Update function of the attack, called after every optimizer step; None if it has none."""
        attack = ATTACKS[self.args.attack]
        if not attack.update:
            return None
        return partial(getattr(attacks, attack.update), **self.args.keywords(attack.update_keywords))

    @cached_property
    def evaluation_batch(self) -> int:
        """Number of images in an evaluation batch of this process."""
        return evaluation_batch(self.args.batch_size, self.state.model, self.train.batch(slice(2))[0])

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files."""
        return self.world.is_main and self.folder.exists

    @property
    def stop(self) -> Stop:
        return Stop(self.signals, self.world, "; --resume auto continues from here")


@dataclass(frozen=True)
class Batch:
    """A process's share of a batch.

    Attributes:
        x, y: images, (B, C, H, W), and labels, (B,).
        whole: training-set indices of the images of all processes, (global batch,).
        drawn: crops, flips and angles of x.
        number: number of the batch in the epoch, from 0.
    """

    x: Tensor
    y: Tensor
    whole: Tensor
    drawn: dict[str, Tensor]
    number: int


class Plan(NamedTuple):
    """Decisions of rank 0 before training.

    Attributes:
        found: checkpoint from which the run continues; None for a new run.
        notes: lines to print about the checkpoint.
        images: training, validation and test images.
        complete: the run is finished.
        earlier: folder to which the files of an earlier run were moved; None if there were none.
    """

    found: Checkpoint | None
    notes: list[str]
    images: tuple[Images, Images, Images]
    complete: bool
    earlier: str | None


def main(dataset: DataSet, args: Args) -> None:
    """Train or, with --eval, evaluate on `dataset`. An error ends the process."""
    with one_line_errors(args.fname), StopSignals() as signals, advice_on_failure(signals, NO_ROOM):
        if args.eval:
            evaluation.evaluate_training(dataset, args, signals)
            return
        folder = Folder(args.fname)
        try:
            run_training(dataset, args, folder, signals)
        finally:
            folder.release()


def train(network: nn.Module, images: Tensor, labels: Tensor, method: str, *, epochs: int, seed: int = 0,
          augment: dict[str, Any] | None = None, test: tuple[Tensor, Tensor] | None = None,
          folder: str | Path | None = None, **flags: Any) -> list[dict[str, Any]]:
    """Train a network of your own with a method of this package.

    Afterwards, the network is in eval mode on --device; with --ema, it has the averaged weights.

    Args:
        network: images in [0, 1], (B, C, H, W), to logits (B, classes).
        images, labels: (N, C, H, W), uint8 or float in [0, 1]; (N,).
        method: a name of --method.
        augment: keywords of `data.Augmentation`, such as dict(padding=4, flip=True); None: no augmentation.
        test: images and labels for the evaluation of every epoch; None: no evaluation.
        folder: folder for checkpoints and logs; None: no file is written.
        flags: flags of train_cifar.py, with its defaults except quiet=True and final_iters=0 (and, above epsilon 8,
            liet_every=20).

    Returns:
        The history: a record for each epoch.

    Raises:
        UsageError: a flag is wrong. Failure: the loss is no longer finite, memory ran out, --compile failed, or
            on_collapse="stop" stopped the run.
    """
    dataset = DataSet(options.OWN, options.OWN, int(labels.max()) + 1, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0),
                      options.CIFAR10.defaults, augment or {})
    given = {"quiet": True, "final_iters": 0, "epochs": epochs, "seed": seed, **flags, "method": method}
    args = options.arguments(dataset, {**given, "fname": str(folder)} if folder else given)
    own, empty = Images.of(images, labels), Images.of(images[:0], labels[:0])
    held_out = own[len(own) - args.val_size:] if args.val_size else empty
    loaded = (own[:args.train_samples or len(own) - args.val_size], held_out, Images.of(*test) if test else empty)
    place, signals = Folder(folder), StopSignals()
    try:
        with advice_on_failure(signals, NO_ROOM):
            state = run_training(dataset, args, place, signals, network, loaded)
    finally:
        place.release()
    network.load_state_dict(state.evaluated.state_dict())
    network.eval()
    return state.history


def run_training(dataset: DataSet, args: Args, folder: Folder, signals: StopSignals, network: nn.Module | None = None,
                 images: tuple[Images, Images, Images] | None = None) -> State:
    """Build a run, load its checkpoint if it resumes, train, and run the final evaluation. Returns the state.

    Args:
        network, images: used instead of those that `args` describe.
    """
    device = choose_device(args)
    world = World.join(device)
    screen = Screen(world.is_main, args.quiet)
    with world.said_once():
        state, layout = build(dataset, args, device, world, network)
        plan = world.from_main(lambda: prepare(dataset, args, state, folder, world, signals, screen, images))
        if plan.found and not world.is_main:
            resume(state, plan.found, args)  # rank 0 resumed in `prepare`
    signals.deferred = True
    for note in plan.notes:
        screen.say(f"# {note}")
    if plan.complete:
        screen.say(f"{args.fname} is complete: nothing to do")
    else:
        run = assemble(dataset, args, state, folder, world, signals,
                       [part.to(device, layout) for part in plan.images], screen)
        start(run, plan)
        train_epochs(run)
        finish(run)
        if folder.exists:
            screen.say(console.results_lines(args, (state.history or [{}])[-1], len(run.test)))
    world.leave()
    return state


def build(dataset: DataSet, args: Args, device: torch.device, world: World,
          network: nn.Module | None = None) -> tuple[State, torch.memory_format]:
    """Return the initial state (by default with a new network) on the device, and its memory layout."""
    precision = Precision(args, device)
    if args.sync_bn and (world.size == 1 or device.type != "cuda"):
        raise UsageError("--sync-bn is for several processes on CUDA, under torchrun")
    if args.compile and args.compile_mode == "max-autotune" and world.size > 1:
        raise UsageError("--compile-mode max-autotune fails under torchrun: use another mode")
    if network is None:
        seed_everything(WEIGHTS, args.seed)
        network = new_network(dataset, args)
    if args.sync_bn:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    layout = memory_format(network, device)
    if args.compile and layout == torch.contiguous_format:  # the compiler would choose channels_last by itself
        raise UsageError("--compile on a CPU needs --base-width 16 or more")
    model = network.to(device).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), args.lr_max, args.momentum, weight_decay=args.weight_decay,
                                fused=True)
    for parameter in model.parameters():  # uninitialized if float16's scaler skips the first step
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    precision.prepare(model, optimizer)
    return State(model, optimizer, precision, Average(model, args.ema) if args.ema else None), layout


def prepare(dataset: DataSet, args: Args, state: State, folder: Folder, world: World, signals: StopSignals,
            screen: Screen, images: tuple[Images, Images, Images] | None) -> Plan:
    """On rank 0: load the checkpoint, read the images, lock the folder, and move old files away."""
    found = None
    if folder.exists:
        folder.require_writable()
        if folder.names(r"\.lock|(state|(model|opt)_\d+)\.pth"):
            folder.lock()  # before any of its files is read
        found = states.find_checkpoint(folder, args.resume) if args.resume else None
    notes = [f"{found.source}: {note}" for note in resume(state, found, args)] if found else []
    if images is None:
        if dataset.memory and not args.dummy:
            screen.say(f"# {dataset.name}: its images take {dataset.memory / 1e9:.2f} GB, in memory and on the device")
        with screen.progress(f"reading {dataset.name}"):
            images = load(dataset, args)
    if (len(images[0]) - 1) % args.batch_size + 1 < world.size:
        raise UsageError(f"the last batch has fewer images than processes ({world.size}): change "
                         f"--train-samples or --batch-size")
    if found and state.epoch == args.epochs and is_complete(args, state, folder, len(images[2])):
        if state.final and not (folder.path / "final.json").exists():  # killed between writing the state and the logs
            states.remove_unfinished(folder)
            folders.write_logs(folder, state, args)
        return Plan(found, notes, images, True, None)
    earlier = None
    signals.deferred = True  # move all files or none
    if folder.exists:
        folder.lock()
        state.final = None
        earlier, best_is_gone = states.move_old_files(folder, state, found)
        if best_is_gone:
            state.best = -1.0
    return Plan(found, notes, images, False, earlier)


def resume(state: State, found: Checkpoint, args: Args) -> list[str]:
    """Load the checkpoint into `state`, the network first. Returns notes to print."""
    notes = load_network(state.evaluated, found.model, found.source, not args.given & {"mean", "std"})
    if state.ema:
        state.model.load_state_dict(state.evaluated.state_dict())
    return notes + states.resume(state, found, args)


def assemble(dataset: DataSet, args: Args, state: State, folder: Folder, world: World, signals: StopSignals,
             images: Iterable[Images], screen: Screen | None = None) -> Run:
    """Return the run: network compiled and distributed, functions of attack, objective and schedules, and images."""
    if not world.is_main:
        state.sums = torch.zeros_like(state.sums)  # the saved sums are those of all processes
    network = state.model
    if args.compile and OBJECTIVES[args.objective].compiles:
        share = len(range(world.rank, args.batch_size, world.size))  # images of this process in a full batch
        network = Compiled(state.model, share, args.compile_mode)
    forward = network
    if world.size > 1:
        forward = nn.parallel.DistributedDataParallel(network, [world.device] if world.device.type == "cuda" else None)
    event_files = None
    if args.tensorboard and world.is_main and folder.exists:
        event_files = EventFiles(folder.path / "tensorboard")
    training, held_out, test = images
    keywords = args.keywords(ATTACKS[args.attack].keywords)
    alpha = keywords.pop("alpha", None)
    objective = partial(getattr(objectives, args.objective), **args.keywords(OBJECTIVES[args.objective].keywords))
    return Run(args, state, folder, world, signals, network, forward,
               partial(getattr(attacks, args.attack), **keywords), objective, alpha, schedule(args, dataset),
               momentum(args, dataset), augmentation(args, dataset), training, held_out, test,
               screen or Screen(quiet=True), event_files, dataset.classes)


def start(run: Run, plan: Plan) -> None:
    """Record this launch in the state and the logs, and print the banner."""
    args, state, world = run.args, run.state, run.world
    state.final = None
    state.starts.append({**describe(world.device, world.size), "epoch": state.epoch, "step": state.step,
                         "evaluation_batch": run.evaluation_batch,
                         "source": plan.found.source if plan.found else None, "aside": plan.earlier})
    if run.writes:
        folders.write_logs(run.folder, state, args)
    method = options.as_flags(options.in_effect(args))
    images = (len(run.train), len(run.held_out), len(run.test))
    run.screen.say(console.banner(args, method, described(args, state.model), run.network is not state.model,
                                  state.starts[-1], images, run.steps))
    for note in notes(run, plan):
        run.screen.say(f"# {note}")
    for hint in options.unit_hints(args.flags()):
        run.screen.warn(hint)


def described(args: Args, network: nn.Module) -> str:
    """Return the network's architecture and number of parameters."""
    if args.data_set == options.OWN:
        title = type(network).__name__
    elif args.model == "WideResNet":
        title = f"WideResNet-{args.depth}-{args.width_factor}"
    else:
        title = f"{args.model} of base width {args.base_width}"
    return f"{title}, {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters"


def notes(run: Run, plan: Plan) -> Iterator[str]:
    """Yield notes to print under the banner."""
    args, device = run.args, run.world.device
    if plan.found:
        yield folders.resumed_line(run.state.starts[-1]).removeprefix("# ")
    if plan.earlier:
        yield f"files of an earlier run are now in {plan.earlier}"
    standard = args.model != "WideResNet" and args.data_set != options.OWN
    if device.type == "cpu" and args.base_width >= 64 and standard and not args.dummy:
        yield ("on a CPU, this network takes hours; --base-width=16 is about ten times as fast, and "
               "--last-samples=1000 shortens the last-epoch evaluation")
    yield from precision_hints(args, device)
    for name, value in args.dropped.items():
        yield (f"{options.option(name)}={getattr(args, name)}, not {value} as in --recipe {args.recipe}: the attack or "
               f"the loss requires it")
    if "pad_mode" in args.given and not run.augmentation.padding:
        yield f"--pad-mode has no effect: images of {args.data_set} are not cropped"
    yield from options.idle_flags(args)
    if (args.chkpt_steps or 0) > run.steps:
        yield f"--chkpt-steps={args.chkpt_steps} has no effect: an epoch has {run.steps} training steps"
    yield from options.pgd_hints(args)
    attack = ATTACKS[args.attack]
    if attack.stored:
        height, width, channels = run.train.pixels.shape[1:]
        margin = 2 * run.augmentation.padding * attack.stored_padded
        size = 2 * attack.stored * len(run.train) * channels * (height + margin) * (width + margin)
        yield f"--attack {args.attack} stores {size / 1e6:,.0f} MB of perturbations, in half precision, on {device}"
    if run.world.size > 1 and OBJECTIVES[args.objective].whole_batch:
        yield (f"--objective {args.objective} is not a mean over images: each of the {run.world.size} processes "
               f"computes it on its own images, so the loss differs from that of one process")
    if args.compile and not OBJECTIVES[args.objective].compiles:
        yield f"--compile is off: torch.compile cannot differentiate --objective {args.objective}"


def train_epochs(run: Run) -> None:
    """Train and evaluate epoch by epoch, until all are done."""
    args, state = run.args, run.state
    stop_on_collapse(run)  # the run may have been killed between saving a collapsed epoch and stopping
    with run.screen.progress("training", args.epochs * run.steps, "step", state.epoch * run.steps + state.step) as bar:
        while state.epoch < args.epochs:
            with saved_if_stopped(run):
                with advice_on_failure(run.signals, f"lower --batch-size (now {args.batch_size})"):
                    trained = train_epoch(run, AfterStep(run, bar))
                if run.world.size > 1:  # torchrun may not wait for the end of an evaluation
                    save(run)
                finish_epoch(run, trained, measure(run) if len(run.test) else {})
                stop_on_collapse(run)


def train_epoch(run: Run, after_step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Train the remaining steps of the current epoch. Returns the epoch's training metrics.

    Image order and augmentation depend only on seed and epoch; random starting points also on training step and
    process. The training steps do not synchronize with the device; `after_step` may.
    """
    state, device = run.state, run.train.labels.device
    seed_everything(ORDER, run.args.seed, state.epoch)
    order = torch.randperm(len(run.train)).to(device)
    drawn = {name: values.to(device) for name, values in run.augmentation.draw(len(run.train)).items()}
    state.sums, state.first_fault = state.sums.to(device), state.first_fault.to(device)
    began = time.perf_counter() - state.seconds
    state.model.train()
    while state.step < run.steps:
        with kernel_search(not run.args.deterministic):
            train_step(run, batch(run, order, drawn))
        state.step += 1
        state.seconds = time.perf_counter() - began
        after_step()
    require_finite(run)
    sums = named_sums(run.world.sum(state.sums))
    state.seconds = time.perf_counter() - began
    n, early, rise = sums["images"], sums["early_images"], None
    if 0 < early < n:
        rise = (sums["correct"] - sums["early_correct"]) / (n - early) - sums["early_correct"] / early
    return {"train_time": state.seconds, "lr": run.schedule(state.epoch + 1), "train_robust_loss": sums["loss"] / n,
            "train_robust_acc": sums["correct"] / n, "defence_mean": 255 * sums["perturbation"] / n,
            "train_images": int(n), "train_rise": rise,
            "abnormal": sums["abnormal"] / sums["compared"] if sums["compared"] else None,
            **peak_memory("train_memory", device)}


def batch(run: Run, order: Tensor, drawn: dict[str, Tensor]) -> Batch:
    """Return this process's share of the next batch, augmented."""
    size, world = run.args.batch_size, run.world
    number = run.state.step // run.replays
    whole = range(number * size, min((number + 1) * size, len(run.train)))
    share = slice(whole.start + world.rank, whole.stop, world.size)
    own = {name: values[share] for name, values in drawn.items()}
    x, y = run.train.batch(order[share], run.augmentation, own)
    return Batch(x, y, order[whole.start:whole.stop], own, number)


def train_step(run: Run, batch: Batch) -> None:
    """Perturb the batch, compute the loss, and update the weights."""
    args, state, world, x, y = run.args, run.state, run.world, batch.x, batch.y
    precision = state.precision
    now = state.epoch + (state.step + 1) / run.steps
    for group in state.optimizer.param_groups:
        group["lr"], group["momentum"] = run.schedule(now), run.momentum(now)
    growth = min(1.0, now / args.eps_warmup) if args.eps_warmup else 1.0
    epsilon = growth * (args.epsilon / 255)
    alpha = {} if run.alpha is None else {"alpha": growth * run.alpha}
    attack = ATTACKS[args.attack]
    step = Step(run.network, len(run.train), batch.whole, state.epoch, batch.number, state.epoch / args.epochs,
                state.kept, world.rank, world.size, world.sum, OBJECTIVES[args.objective].graph, args.epochs,
                batch.drawn, run.augmentation.padding, state.optimizer, run.classes, checks=False)
    if attack.eval_mode:
        world.broadcast_buffers(state.model)  # eval mode reads BatchNorm's statistics; the state saves those of rank 0
    seed_everything(STEP, args.seed, state.epoch, state.step, world.rank)
    with precision.autocast():
        delta = run.attack(run.network, x, y, epsilon, step=step, **alpha)
        delta.requires_grad_(run.update is not None)
        loss, logits = run.objective(run.forward, x, y, delta, epsilon, step)
    scale = precision.loss_scale(loss) if run.update else 1.0
    weight = len(y) * world.size / len(batch.whole)  # makes the mean over processes the mean over images
    finite = precision.backward_and_step(loss * weight, state.optimizer)
    if run.update:
        leaf = step.start if attack.update_at == "start" else delta
        grad = torch.zeros_like(delta) if leaf.grad is None else leaf.grad / (scale * weight)
        run.update(step, x, delta.detach(), grad, epsilon)
    if state.ema:
        state.ema.update()
    state.first_fault = torch.where(finite, state.first_fault, state.first_fault.clamp(max=state.step))
    sum_up(run, step, y, delta.detach(), loss.detach(), logits.detach())


def sum_up(run: Run, step: Step, y: Tensor, delta: Tensor, loss: Tensor, logits: Tensor) -> None:
    """Add a step's loss, accuracy and perturbation to the epoch's sums, without synchronization with the device."""
    n, correct = torch.full_like(loss.double(), len(y)), (logits.argmax(dim=1) == y).sum().double()
    abnormal, compared = collapse.abnormal(step.logits, logits, y)
    early = float(2 * run.state.step < run.steps)
    size = attacks.magnitude(delta, run.args.norm).mean().double()
    run.state.add(loss=loss.double() * n, correct=correct, images=n, perturbation=size * n,
                  abnormal=abnormal, compared=n * (compared > 0), early_correct=early * correct, early_images=early * n)


class AfterStep:
    """After each step: show progress, save every --chkpt-steps, stop on a signal."""

    def __init__(self, run: Run, bar: Progress):
        self.run, self.bar = run, bar
        self.unchecked, self.checked_at, self.check_every = 0, time.perf_counter(), 1
        self.shown_at = 0.0
        self.title = f"training, epoch {run.state.epoch + 1}"
        compiling = run.network is not run.state.model and not bar.timed
        bar.tell(f"{self.title}, compiling" if compiling else self.title)

    def __call__(self) -> None:
        run, bar, now = self.run, self.bar, time.perf_counter()
        if run.screen.shown and now - self.shown_at > 2:  # reading the sums synchronizes with the device
            sums = named_sums(run.state.sums)
            bar.tell(self.title, loss=f"{sums['loss'] / sums['images']:.3f}",
                     train=f"{100 * sums['correct'] / sums['images']:.1f}")
            self.shown_at = now
        bar.update()
        if bar.done - bar.first == TIMED_STEPS:
            run.screen.say(f"# {bar.left()} at this pace, evaluations not included")
        if run.args.chkpt_steps and run.state.step % run.args.chkpt_steps == 0:
            save(run)
        self.unchecked += 1
        if self.unchecked >= self.check_every or run.state.step == run.steps or run.world.size == 1:
            run.stop.together()
            pace = run.world.max((now - self.checked_at) / self.unchecked)
            self.check_every = max(1, min(STOP_STEPS, int(STOP_SECONDS / max(pace, 1e-9))))
            self.unchecked, self.checked_at = 0, now


@contextlib.contextmanager
def saved_if_stopped(run: Run) -> Iterator[None]:
    """Save the state if a signal stops the run or standard output was closed.

    With several processes, a closed output saves nothing: only rank 0 sees it, and would wait for the others forever.
    The last complete epoch is already saved.
    """
    try:
        yield
    except Stopped as stop:
        if not stop.midway:
            save(run)
        raise
    except BrokenPipeError:
        if run.world.size == 1:
            save(run)
        raise


def measure(run: Run) -> dict[str, Any]:
    """Evaluate the network after an epoch. Returns metrics, score and seconds."""
    args, state, began = run.args, run.state, time.perf_counter()
    epsilon = args.epsilon / 255
    last = state.epoch + 1 == args.epochs
    # The best network is chosen on the same number of images in every epoch.
    fixed = len(run.test) if args.full_test else args.test_samples
    test = run.test[:max(fixed, args.last_samples or len(run.test)) if last else fixed]
    pgd = PGD(epsilon, args.pgd_alpha / 255, args.test_iters, args.test_restarts, args.seed, norm=args.norm)
    result = evaluate_network(run, state.evaluated, test, pgd)
    if not state.history:
        run.screen.say(console.final_estimate(args, time.perf_counter() - began, len(test),
                                      asked(args, state, run.folder, len(run.test))["images"]))
    score, found = result.metrics(fixed)["robust_acc"], result.metrics()
    metrics = {title: found[name] for title, name in (
        ("test_loss", "clean_loss"), ("test_acc", "clean_acc"), ("test_robust_loss", "robust_loss"),
        ("test_robust_acc", "robust_acc"), ("attack_mean", "attack_mean"), ("no_gradient", "no_gradient"),
        ("test_images", "images"))}
    fgsm = evaluate_network(run, state.evaluated, test, PGD(epsilon, epsilon, 1, 1, args.seed, "zero", norm=args.norm),
                            Restart(0, result.unperturbed()))
    metrics["fgsm_acc"] = fgsm.metrics()["robust_acc"]
    x, y = run.test.batch(slice(WATCHED))
    seed_everything(WATCH, args.seed, state.epoch)
    metrics |= collapse.signs(state.evaluated, x, y, epsilon, args.norm)
    if len(run.held_out):
        validation = evaluate_network(run, state.evaluated, run.held_out, pgd).metrics()
        metrics |= {"val_robust_acc": validation["robust_acc"], "val_images": validation["images"]}
        score = validation["robust_acc"]
    return {**metrics, **peak_memory("test_memory", run.world.device), "score": score,
            "test_time": time.perf_counter() - began}


def evaluate_network(run: Run, model: nn.Module, images: Images, attack: PGD, begun: Restart | None = None,
                     keep: Callable[[Restart], None] = lambda restart: None) -> Result:
    """Evaluate a network under an attack, with a progress bar. Calls `keep` after each restart but the last."""
    batch_size, world = run.evaluation_batch, run.world
    title = "FGSM" if attack.steps == 1 and attack.init == "zero" else f"PGD-{attack.steps}"
    with advice_on_failure(run.signals, too_many_at_once(batch_size, world.device)):
        events = robustness.attack_steps(model, images, attack, batch_size, run.state.precision, world, begun)
        for restart in robustness.shown(events, run.screen, title, attack.restarts, run.stop):
            if 0 < restart.number < attack.restarts:
                keep(restart)
    return restart.result


def finish_epoch(run: Run, trained: dict[str, Any], measured: dict[str, Any]) -> None:
    """Record, save and print a finished epoch."""
    state, args = run.state, run.args
    record = {"epoch": state.epoch, **trained, **measured}
    if measured:
        if not math.isfinite(measured["test_loss"] + measured["test_robust_loss"]):
            raise not_finite(run, state.step - 1)
        score = record.pop("score")
        record["best"] = score > state.best
        state.best = max(state.best, score)
        record["collapsed"] = collapse.collapsed([*state.history, record])[-1]
    state.history.append(record)
    state.begin_epoch(state.epoch + 1)
    if run.writes:
        checkpoint = state.epoch % args.chkpt_iters == 0 or state.epoch == args.epochs
        due: dict[str | int, bool] = {
            "healthy": bool(measured) and not record["collapsed"], "best": bool(measured) and record["best"],
            state.epoch - 1: checkpoint}
        states.save_network(run.folder, state.evaluated.state_dict(), [name for name, is_due in due.items() if is_due])
        if checkpoint:
            states.save(run.folder.file("opt", state.epoch - 1), state.training(args, state.sums))
    save(run)
    run.screen.say(console.epoch_line(record, state.history, args.epochs))  # last: standard output may be closed
    if record.get("collapsed"):
        run.screen.warn(console.collapse_line(record))
    for warning in robustness.no_gradient("PGD", record.get("no_gradient", 0.0)):
        run.screen.warn(warning)
    if weaker_than_fgsm(record) and not any(map(weaker_than_fgsm, state.history[:-1])):
        run.screen.say("# PGD is weaker than FGSM: raise --test-iters, or set --pgd-alpha to a quarter of --epsilon")


def weaker_than_fgsm(record: dict[str, Any]) -> bool:
    """Return whether PGD left more images robust than FGSM after an epoch."""
    return record.get("test_robust_acc", 0.0) > record.get("fgsm_acc", 1.0)


def stop_on_collapse(run: Run) -> None:
    """After a collapsed epoch, stop the run if --on-collapse=stop asks for it."""
    state = run.state
    if run.args.on_collapse == "stop" and state.step == 0 and state.history and state.history[-1].get("collapsed"):
        healthy = run.folder.file("model", "healthy")
        network = f"the last healthy network is in {healthy}; " if healthy.exists() else ""
        raise Failure(f"collapsed in epoch {state.epoch}; {network}to continue anyway: --resume=auto "
                      f"--on-collapse=warn")


def save(run: Run) -> None:
    """Save everything that --resume auto needs to continue. Every process has to call it."""
    require_finite(run)
    sums = run.world.sum(run.state.sums)
    if run.writes:
        states.save_state(run.folder, run.state, run.args, sums)
    if run.event_files:
        run.event_files.draw(run.state.history)


def require_finite(run: Run) -> None:
    """Raise Failure if a loss or gradient of this epoch, a weight or a logit is not finite."""
    state = run.state
    fault = run.world.min(state.first_fault).item()
    if fault < math.inf:
        raise not_finite(run, int(fault))
    if state.step:
        training = state.model.training
        x, _ = (run.test if len(run.test) else run.train).batch(slice(run.evaluation_batch))
        answers = state.precision.float32_logits(state.model.eval(), x)
        state.model.train(training)
        sound = torch.stack([values.isfinite().all() for values in (*state.model.state_dict().values(), answers)]).all()
        if run.world.max(not sound):
            raise not_finite(run, state.step - 1)


def not_finite(run: Run, step: int) -> Failure:
    """Return the Failure for a training step whose loss, gradient or weights are not finite."""
    good = run.folder.path / "state.pth"
    advice = "lower --lr-max" if run.state.precision.dtype is not torch.float16 else \
        "lower --lr-max, or use --amp-dtype=bfloat16, whose range is wider"
    if good.exists():
        advice += ", and continue from this state with --resume=auto --allow-changes"
    saved = f"the last good state is {good}" if good.exists() else "no state was saved before"
    return Failure(f"the loss, a gradient or a weight is no longer finite in epoch {run.state.epoch + 1}, "
                   f"step {step + 1}; {saved}: {advice}")


def asked(args: Args, state: State, folder: Folder, images: int) -> dict[str, Any]:
    """Return the settings of the final evaluation, on up to `images` test images.

    The network is the last one if there is no best one.
    """
    best = args.final_model == "best" and folder.file("model", "best").exists()
    return {"model": "best" if best else "last", "iters": args.final_iters, "restarts": args.final_restarts,
            "alpha": args.pgd_alpha, "epsilon": args.epsilon, "norm": args.norm, "epoch": state.epoch - 1,
            "images": min(args.final_samples or images, images)}


def is_complete(args: Args, state: State, folder: Folder, images: int) -> bool:
    """Return whether a fully trained run also has its final evaluation."""
    return not args.final_iters or bool(
        state.final and asked(args, state, folder, images).items() <= {"norm": "l_inf", **state.final}.items())


def finish(run: Run) -> None:
    """Run the final evaluation (by default PGD-50-10), and record and print its results."""
    state, history = run.state, run.state.history
    if not len(run.test):
        return
    run.screen.say("# " + console.summary_line(collapse.summary(history), len(history)))
    if not run.args.final_iters:
        return
    found = final_evaluation(run)
    state.final = {**found, **collapse.summary(history)}
    save(run)
    if run.writes:
        (run.folder.path / "final.pth").unlink(missing_ok=True)
    run.screen.say(console.final_line(found))
    for warning in robustness.no_gradient("the final evaluation", found["no_gradient"]):
        run.screen.warn(warning)


def final_evaluation(run: Run) -> dict[str, Any]:
    """Run the final evaluation, or complete an interrupted one. Returns its record."""
    args, state, part = run.args, run.state, run.folder.path / "final.pth"

    def load_final() -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
        wanted = asked(args, state, run.folder, len(run.test))
        best = states.read_checkpoint(run.folder.file("model", "best")) if wanted["model"] == "best" else None
        return wanted, best, interrupted(part)

    wanted, best, saved = run.world.from_main(load_final)
    model = state.evaluated
    if best:
        model = copy.deepcopy(model)
        load_network(model, best, "model_best.pth")
    key = {**wanted, "seed": args.seed, "network": fingerprint(model)}
    begun, began = None, time.perf_counter()
    if saved.get("key") == key:
        begun = Restart(saved["restart"], Result(**saved["found"]))
        began -= saved["seconds"]

    def keep(restart: Restart) -> None:
        if run.writes:
            states.save(part, {"key": key, "restart": restart.number, "seconds": time.perf_counter() - began,
                               "found": vars(restart.result)})

    pgd = PGD(args.epsilon / 255, args.pgd_alpha / 255, wanted["iters"], wanted["restarts"], args.seed, norm=args.norm)
    result = evaluate_network(run, model, run.test[:wanted["images"]], pgd, begun, keep)
    return {**wanted, "seconds": time.perf_counter() - began, **result.metrics(),
            **peak_memory("memory", run.world.device)}


def interrupted(part: Path) -> dict[str, Any]:
    """Return what an interrupted final evaluation saved; {} if there is none."""
    try:
        return states.read_checkpoint(part)
    except UsageError:
        return {}


def augmentation(args: Args, dataset: DataSet) -> Augmentation:
    """Return the data set's augmentation, changed by --pad-mode and --rotate."""
    changes = {"pad_mode": args.pad_mode, "degrees": args.rotate}
    given = {name: value for name, value in changes.items() if value is not None}
    return Augmentation(**{**dataset.augmentation, **given})


def schedule(args: Args, dataset: DataSet) -> Callable[[float], float]:
    """Return the learning rate as a function of the time in epochs. Every training step sets it."""
    if args.lr_schedule == "cyclic":
        return partial(cyclic, lr_max=args.lr_max, peak=dataset.peak(args.epochs), epochs=args.epochs)
    if args.lr_schedule == "onedrop":
        return partial(onedrop, lr_max=args.lr_max, drop=args.lr_drop)
    cycle = onecycle if args.lr_schedule == "onecycle" else onecycle_by_epoch
    return partial(cycle, epochs=args.epochs, begin=args.lr_max / 25, peak=args.lr_max, end=args.lr_max / 250_000)


def momentum(args: Args, dataset: DataSet) -> Callable[[float], float]:
    """Return the momentum as a function of the time in epochs."""
    high, low = args.momentum, args.momentum_low
    if args.lr_schedule == "cyclic":
        return lambda t: high - (high - low) * cyclic(t, 1.0, dataset.peak(args.epochs), args.epochs)
    if args.lr_schedule == "onedrop":
        return lambda t: high
    cycle = onecycle if args.lr_schedule == "onecycle" else onecycle_by_epoch
    return partial(cycle, epochs=args.epochs, begin=high, peak=low, end=high)


def cyclic(t: float, lr_max: float, peak: float, epochs: float) -> float:
    """Return the learning rate at t: linear from 0 to `lr_max` at `peak`, and back to 0 at `epochs`."""
    if t < peak:
        return lr_max * (t / peak)
    return lr_max * ((epochs - t) / (epochs - peak))


def onedrop(t: float, lr_max: float, drop: float) -> float:
    """Return the learning rate at t: `lr_max`, and a tenth of it from `drop` on."""
    return lr_max if t < drop else lr_max / 10


def onecycle(t: float, epochs: float, begin: float, peak: float, end: float) -> float:
    """Return the value at t: from `begin` to `peak` in three tenths of the epochs, then to `end`, along cosines.

    As PyTorch's OneCycleLR (Smith and Topin, arXiv 1708.07120), except that before the peak, this function
    reaches each value up to one training step earlier than PyTorch's.
    """
    return _cosines(t / epochs, 0.3, begin, peak, end)


def onecycle_by_epoch(t: float, epochs: float, begin: float, peak: float, end: float) -> float:
    """Return the value at t of OneCycleLR advanced after every epoch, as in FastAT_Benchmark: constant in an epoch."""
    epoch, last, turn = math.ceil(t) - 1, epochs - 1, 0.3 * epochs - 1
    return _cosines(epoch / last if last else 1.0, turn / last if last else 0.0, begin, peak, end)


def _cosines(share: float, turn: float, begin: float, peak: float, end: float) -> float:
    """Return the value at `share`: along cosines from `begin`, at 0, to `peak`, at `turn`, to `end`, at 1."""
    if share < turn:
        return peak + (begin - peak) * (1 + math.cos(math.pi * share / turn)) / 2
    return end + (peak - end) * (1 + math.cos(math.pi * (share - turn) / (1 - turn))) / 2
