"""One run, from top to bottom: what every training script does once it has stated its data set.

`train` is the whole of it; the functions below are its steps, in the order in which they are taken.
"""
import contextlib
import copy
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from . import attacks, collapse, objectives, options, robustness
from .attacks import Step
from .checkpoints import fingerprint, load_network
from .data import Augmentation, Images, load
from .methods import ATTACKS, OBJECTIVES
from .networks import new_network
from .options import Args, DataSet
from .robustness import Verdict
from .run import folder as folders
from .run import state as states
from .run.console import (
    Failure,
    Progress,
    Screen,
    Stopped,
    StopSignals,
    UsageError,
    banner,
    collapse_line,
    epoch_line,
    final_estimate,
    final_line,
    one_line_errors,
    summary_line,
    where,
)
from .run.device import Compiled, Precision, choose_device, describe, memory_format, seed_everything, slowdown
from .run.distributed import World
from .run.folder import Board, Folder
from .run.state import Found, State

# What random numbers are drawn for: the first part of every key that they are seeded with here. (robustness.py has 3.)
ORDER, STEP, WATCH, WEIGHTS = 0, 1, 2, 4
WATCHED = 128  # test images whose gradients' signs an epoch is watched by
# In training, many processes agree on whether to stop once in so many steps or seconds, whichever is sooner, and at an
# epoch's last step. (torchrun kills them 30 seconds after SIGTERM.)
STOP_STEPS, STOP_SECONDS = 20, 5
TIMED_STEPS = 20  # after so many, it is said how long the training will take


@dataclass(frozen=True)
class Run:
    """What a run is made of. While it runs, nothing in here changes but `state`.

    network: what attacks call, compiled if asked; forward: what is trained, the network or, of several processes,
    DistributedDataParallel around it; attack, objective: of attacks.py and objectives.py, with their keywords; alpha:
    the attack's step, if it has one; schedule, momentum: time in epochs -> learning rate, momentum; held_out: what the
    best model is chosen on, unless on test images.
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
    board: Board | None = None

    @property
    def steps(self) -> int:
        """Steps in an epoch; the last may be on a smaller batch."""
        return math.ceil(len(self.train) / self.args.batch_size)


def main(dataset: DataSet, args: Args) -> None:
    """Train or evaluate on `dataset` as the arguments ask; an error ends the process."""
    with one_line_errors(args.fname), StopSignals() as signals:
        folder = Folder(args.fname)
        try:
            train(dataset, args, folder, signals)
        finally:
            folder.release()


def train(dataset: DataSet, args: Args, folder: Folder, signals: StopSignals) -> None:
    """The run: build it, go on where it was, train epoch by epoch, and evaluate what came out."""
    device = choose_device(args)
    world = World.join(device)
    world.decide(folder.require_writable)
    screen = Screen(world.is_main, args.quiet)
    with world.alike():
        state, layout = build(dataset, args, device, world)
        found = world.decide(lambda: look_for_checkpoint(folder, args))
        if found:
            for note in resume(state, found, args):
                screen.say(f"# {found.source}: {note}")
        with screen.progress(f"reading {dataset.name}"):
            images = load_images(dataset, args, world, device, layout)
    run = assemble(dataset, args, state, folder, world, signals, images, screen)
    if args.eval and found:
        evaluate_only(run, found)
    elif found and state.epoch == args.epochs and world.decide(lambda: is_complete(run)):
        if world.is_main and state.final and not (folder.path / "final.json").exists():
            states.remove_unfinished(folder)  # a kill came between the state and its logs
            folders.render(folder, state, args)
        screen.say(f"{args.fname} is complete: nothing to do")
    else:
        start(run, found, dataset)
        if state.step == 0 and state.history and state.history[-1].get("collapsed"):
            on_collapse(run)  # the run may have been killed between saving this epoch and stopping
        with screen.progress("training", args.epochs * run.steps, "step", state.epoch * run.steps + state.step) as bar:
            while state.epoch < args.epochs:
                with saved_if_stopped(run):
                    with advised(run, f"lower --batch-size (now {args.batch_size})"):
                        trained = train_epoch(run, between_steps(run, bar))
                    if world.size > 1:  # torchrun may not wait for the end of an evaluation
                        save(run)
                    finish_epoch(run, trained, measure(run))
                    if state.history[-1]["collapsed"]:
                        on_collapse(run)
        finish(run)
        screen.say(where(args))
    world.leave()


def build(dataset: DataSet, args: Args, device: torch.device, world: World) -> tuple[State, torch.memory_format]:
    """The network that the seed gives, on the device and in its layout there, and its optimizer."""
    precision = Precision(args, device)
    if args.sync_bn and (world.size == 1 or device.type != "cuda"):
        raise UsageError("--sync-bn is for several processes on CUDA, under torchrun")
    seed_everything(WEIGHTS, args.seed)
    model = new_network(dataset, args)
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    layout = memory_format(model, device)
    if args.compile and layout == torch.contiguous_format:  # the compiler would choose channels_last by itself
        raise UsageError("--compile on a CPU needs --base-width 16 or more")
    model = model.to(device).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), args.lr_max, momentum=0.9, weight_decay=5e-4, fused=True)
    for parameter in model.parameters():  # or where float16's scaler skips the first step, it would stay uninitialized
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    precision.prepare(model, optimizer)
    ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(args.ema), use_buffers=True) \
        if args.ema else None
    return State(model, optimizer, precision, ema), layout


def look_for_checkpoint(folder: Folder, args) -> Found | None:
    """The checkpoint that --resume asks for. A folder that is trained in is locked before anything of it is read."""
    if not args.eval and folder.names(r"\.lock|(state|(model|opt)_\d+)\.pth"):
        folder.lock()
    found = states.find(folder, args.resume, args.eval) if args.resume else None
    if args.eval and found is None:
        raise UsageError(f"--eval: --fname {args.fname} holds no model to evaluate")
    return found


def resume(state: State, found: Found, args) -> list[str]:
    """Load the checkpoint into `state`, the network first. Returns notes to print."""
    notes = load_network(state.judged, found.model, found.source)
    if state.ema:
        state.model.load_state_dict(state.judged.state_dict())
    return notes + states.resume(state, found, args)


def load_images(dataset: DataSet, args: Args, world: World, device: torch.device,
                layout: torch.memory_format) -> list[Images]:
    """The images to train, to choose the best model and to test on, on the device."""
    loaded = world.decide(lambda: load(dataset, args))  # one process reads, or downloads, for all
    if (len(loaded[0]) - 1) % args.batch_size + 1 < world.size:
        raise UsageError(f"--train-samples or --batch-size leaves fewer images in the last batch than the "
                         f"{world.size} processes")
    return [images.to(device, layout) for images in loaded]


def assemble(dataset: DataSet, args: Args, state: State, folder: Folder, world: World, signals: StopSignals,
             images: list[Images], screen: Screen | None = None) -> Run:
    """Compile the network, join it with those of the other processes, and turn names into functions."""
    model = state.model
    if not world.is_main:
        state.sums = torch.zeros_like(state.sums)  # the saved sums are those of all processes
    compiled = args.compile and OBJECTIVES[args.objective].compiles
    share = len(range(world.rank, args.batch_size, world.size))  # of a whole batch
    network = Compiled(model, share, args.compile_mode) if compiled else model
    forward = network
    if world.size > 1:
        forward = nn.parallel.DistributedDataParallel(network, [world.device] if world.device.type == "cuda" else None)
    board = Board(folder.path / "tensorboard") if args.tensorboard and world.is_main else None
    attack = ATTACKS[args.attack]
    keywords = args.keywords(attack.keywords)
    alpha = keywords.pop("alpha", None)
    momentum = partial(onecycle_momentum, epochs=args.epochs) if args.lr_schedule == "onecycle" else \
        lambda t: 0.9
    objective = partial(getattr(objectives, args.objective), **args.keywords(OBJECTIVES[args.objective].keywords))
    return Run(args, state, folder, world, signals, network, forward,
               partial(getattr(attacks, args.attack), **keywords), objective, alpha,
               schedule(args, dataset), momentum, Augmentation(**dataset.augmentation),
               images[0], images[1], images[2], screen or Screen(quiet=True), board)


def start(run: Run, found: Found | None, dataset: DataSet) -> None:
    """Make the folder ready for the epochs to come, and write down what is about to run."""
    args, state, folder, world = run.args, run.state, run.folder, run.world
    state.final = None

    def prepare() -> tuple[str | None, bool]:
        folder.lock()
        return states.make_ready(folder, state, found)

    aside, best_is_gone = world.decide(prepare)
    if best_is_gone:
        state.best = -1.0
    state.starts.append({**describe(world.device, world.size), "epoch": state.epoch, "step": state.step,
                         "source": found.source if found else None, "aside": aside})
    if world.is_main:
        folders.render(folder, state, args)
    parameters = sum(p.numel() for p in state.model.parameters())
    run.screen.say(banner(args, options.as_flags(options.in_effect(args)), parameters, run.network is not state.model,
                          state.starts[-1], (len(run.train), len(run.held_out), len(run.test)), run.steps))
    for note in notes(run, dataset, bool(found), aside):
        run.screen.say(f"# {note}")


def notes(run: Run, dataset: DataSet, resumed: bool, aside: str | None) -> Iterator[str]:
    """What is to be said under the banner."""
    args, device = run.args, run.world.device
    if resumed:
        yield folders.resumed_line(run.state.starts[-1]).removeprefix("# ")
    if aside:
        yield f"files of an earlier run are now in {aside}"
    if device.type == "cpu" and args.base_width >= 64 and args.model != "WideResNet" and not args.dummy:
        yield "on a CPU, this network takes hours; --base-width=16 is some ten times as fast"
    if args.amp and device.type == "cpu" and (slower := slowdown(run.state.precision.dtype)) > 1.2:
        yield f"{args.amp_dtype} is {slower:.1f} times as slow as float32 on this processor: leave --amp out"
    for flag in options.without_effect(args):
        yield f"{flag} has no effect with --attack={args.attack}, --objective={args.objective}, --model={args.model}"
    if 0 < args.epsilon < 1:
        yield f"--epsilon={args.epsilon:g} means {args.epsilon:g}/255: did you mean {255 * args.epsilon:.3g}?"
    if run.world.size > 1 and OBJECTIVES[args.objective].whole_batch:
        yield (f"--objective {args.objective} is computed from each process's own images: with {run.world.size} "
               f"processes its term is another than with one")
    if args.compile and not OBJECTIVES[args.objective].compiles:
        yield f"--compile is off: --objective {args.objective} needs what torch.compile cannot give"


def train_epoch(run: Run, after_step: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Train to the end of the state's epoch, of which some steps may be done. Returns the epoch's training metrics.

    The order of the images and their augmentation depend on the seed and the epoch alone, an attack's random start
    on those, the step and the process. Nothing waits for the device before the epoch is over.
    """
    state, world, batch_size, seed = run.state, run.world, run.args.batch_size, run.args.seed
    device, precision, epsilon = run.train.labels.device, state.precision, run.args.epsilon / 255
    attack = ATTACKS[run.args.attack]
    replays = getattr(run.args, attack.replays) if attack.replays else 1
    seed_everything(ORDER, seed, state.epoch)
    order = torch.randperm(len(run.train)).to(device)
    drawn = {name: values.to(device) for name, values in run.augmentation.draw(len(run.train)).items()}
    state.sums, state.first_fault = state.sums.to(device), state.first_fault.to(device)
    began = time.perf_counter() - state.seconds
    state.model.train()
    while state.step < run.steps:
        now = state.epoch + (state.step + 1) / run.steps
        for group in state.optimizer.param_groups:
            group["lr"], group["momentum"] = run.schedule(now), run.momentum(now)
        batch = state.step // replays
        whole = range(batch * batch_size, min((batch + 1) * batch_size, len(run.train)))
        share = slice(whole.start + world.rank, whole.stop, world.size)
        x, y = run.train.batch(order[share], run.augmentation, {name: values[share] for name, values in drawn.items()})
        seed_everything(STEP, seed, state.epoch, state.step, world.rank)
        step = Step(run.network, len(run.train), order[whole.start:whole.stop], state.epoch, batch,
                    state.epoch / run.args.epochs, state.kept, world.rank, world.size, world.sum,
                    OBJECTIVES[run.args.objective].graph)
        grown = min(1.0, now / run.args.eps_warmup) if run.args.eps_warmup else 1.0
        size = {} if run.alpha is None else {"alpha": grown * run.alpha}
        with precision.autocast():
            delta = run.attack(run.network, x, y, grown * epsilon, step=step, **size)
            delta.requires_grad_(attack.update is not None)
            loss, logits = run.objective(run.forward, x, y, delta, grown * epsilon, step)
        scale = precision.scaler.get_scale() if attack.update else 1.0
        # Gradients are averaged over the processes; shares of a last batch can differ by an image.
        weight = len(y) * world.size / len(whole)
        finite = precision.backward_and_step(loss * weight, state.optimizer)
        if attack.update and delta.grad is not None:
            getattr(attacks, attack.update)(step, x, delta.detach(), delta.grad / (scale * weight), grown * epsilon)
            delta = delta.detach()
        if state.ema:
            state.ema.update_parameters(state.model)
        state.first_fault = torch.where(finite, state.first_fault, state.first_fault.clamp(max=state.step))
        correct, n = (logits.detach().argmax(dim=1) == y).sum().double(), len(y)
        easier, known = collapse.abnormal(step.logits, logits, y)
        first = float(2 * state.step < run.steps)
        state.sums += torch.stack([loss.detach().double() * n, correct, n * torch.ones_like(correct),
                                   delta.abs().mean().double() * n, easier, known * torch.ones_like(correct),
                                   first * correct, first * n * torch.ones_like(correct)])
        state.step += 1
        state.seconds = time.perf_counter() - began
        after_step()
    require_finite(run)
    loss, correct, n, magnitude, easier, known, first_correct, first_n = world.sum(state.sums).tolist()
    state.seconds = time.perf_counter() - began
    rise = (correct - first_correct) / (n - first_n) - first_correct / first_n if first_n and n > first_n else None
    return {"train_time": state.seconds, "lr": run.schedule(state.epoch + 1),
            "train_robust_loss": loss / n, "train_robust_acc": correct / n, "defence_mean": 255 * magnitude / n,
            "train_images": int(n), "train_rise": rise, "abnormal": easier / known if known else None}


def between_steps(run: Run, bar: Progress) -> Callable[[], None]:
    """What is done after every step: show it, save the state if it is time to, stop if asked."""
    unchecked, checked_at, check_every = 0, time.perf_counter(), 1
    told_at = 0.0  # when the bar last told of loss and accuracy
    name = f"training, epoch {run.state.epoch + 1}"
    compiling = run.network is not run.state.model and not bar.timed
    bar.tell(f"{name}, compiling" if compiling else name)

    def after_step() -> None:
        nonlocal unchecked, checked_at, check_every, told_at
        now = time.perf_counter()
        if run.screen.shown and now - told_at > 2:  # looking at the sums waits for the device
            loss, correct, n = run.state.sums[:3].tolist()
            bar.tell(name, loss=f"{loss / n:.3f}", train=f"{100 * correct / n:.1f}")
            told_at = now
        bar.update()
        if bar.done - bar.first == TIMED_STEPS:
            run.screen.say(f"# {bar.left()} at this pace, evaluations aside")
        if run.args.chkpt_steps and run.state.step % run.args.chkpt_steps == 0:
            save(run)
        unchecked += 1
        if unchecked >= check_every or run.state.step == run.steps or run.world.size == 1:
            stop_if_asked(run)
            pace = run.world.max((now - checked_at) / unchecked)
            check_every = max(1, min(STOP_STEPS, int(STOP_SECONDS / max(pace, 1e-9))))
            unchecked, checked_at = 0, now

    return after_step


def stop_if_asked(run: Run) -> None:
    """Stop if a signal came, to whichever process. All processes have to call it together."""
    number = int(run.world.max(run.signals.received or 0))
    if number:
        raise Stopped(signal.Signals(number), "" if run.args.eval else "; --resume auto goes on from here")


@contextlib.contextmanager
def saved_if_stopped(run: Run) -> Iterator[None]:
    """Save what was trained when a signal came or standard output was closed. Of several processes, that output is the
    first one's alone, and the others would wait: the last epoch is saved already."""
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
    """The evaluation of the present network that every epoch ends with, its score, and what it took."""
    args, began = run.args, time.perf_counter()
    last = args.eval or run.state.epoch + 1 == args.epochs
    fixed = len(run.test) if args.full_test else args.test_samples  # the same in every epoch, to choose the best on
    test = run.test[:max(fixed, args.last_samples or len(run.test)) if last else fixed]
    verdict = judged(run, run.state.judged, test, args.test_iters, args.test_restarts)
    if args.epochs > 1 and not (args.eval or run.state.history):
        run.screen.say(final_estimate(args, time.perf_counter() - began, len(test), asked(run)["images"]))
    score, found = verdict.metrics(fixed)["robust_acc"], verdict.metrics()
    metrics = {title: found[name] for title, name in (
        ("test_loss", "clean_loss"), ("test_acc", "clean_acc"), ("test_robust_loss", "robust_loss"),
        ("test_robust_acc", "robust_acc"), ("attack_mean", "attack_mean"), ("no_gradient", "no_gradient"),
        ("test_images", "images"))}
    fgsm = judged(run, run.state.judged, test, 1, 1, alpha=args.epsilon / 255, init="zero",
                  before=(0, verdict.unperturbed()))
    metrics["fgsm_acc"] = fgsm.metrics()["robust_acc"]
    x, y = run.test.batch(slice(WATCHED))
    seed_everything(WATCH, args.seed, run.state.epoch)
    metrics |= collapse.signs(run.state.judged, x, y, args.epsilon / 255)
    if len(run.held_out):
        validation = judged(run, run.state.judged, run.held_out, args.test_iters, args.test_restarts).metrics()
        metrics |= {"val_robust_acc": validation["robust_acc"], "val_images": validation["images"]}
        score = validation["robust_acc"]
    if run.world.device.type == "cuda":
        metrics["peak_memory"] = torch.cuda.max_memory_allocated(run.world.device)
    return {**metrics, "score": score, "test_time": time.perf_counter() - began}


def evaluation_batch(args, device: torch.device) -> int:
    """How many images a process evaluates at once, fewer where --batch-size, of all processes, is small.

    For an image, an attack stores as much as a training step: 4 MiB in float32, or 23 with a WideResNet-34-10.
    """
    fuller = device.type == "cuda" and args.model != "WideResNet"
    return min(args.batch_size, 128) * (4 if fuller else 1)


def judged(run: Run, model: nn.Module, images: Images, steps: int, restarts: int, alpha: float | None = None,
           init: str = "random", keep: Callable[[int, Verdict], None] = lambda restart, found: None,
           before: tuple[int, Verdict] | None = None) -> Verdict:
    """What PGD leaves of `model` on `images`, with the run's epsilon and, unless told otherwise, its step.

    `keep` is given what all processes have found before each restart, and the evaluation can go on from it.
    """
    args, world = run.args, run.world
    alpha = args.pgd_alpha / 255 if alpha is None else alpha
    attack = robustness.PGD(args.epsilon / 255, alpha, steps, restarts, args.seed, init)
    batch_size = evaluation_batch(args, world.device)
    name = "FGSM" if steps == 1 and init == "zero" else f"PGD-{steps}"

    def progress(images_done: int) -> None:
        bar.update(images_done * world.size)
        if world.size == 1:  # many are not at the same step
            stop_if_asked(run)

    def between(restart: int, found: Verdict) -> None:
        whole = found.sums(world)
        if restart:
            keep(restart, whole)
        if restarts > 1:
            bar.tell(f"{name}, restart {restart + 1}/{restarts}, {100 * whole.robust.mean().item():.1f}% still robust")
        stop_if_asked(run)

    with run.screen.progress(name, len(images), "image") as bar, \
            advised(run, f"an evaluation takes up to {batch_size} images at once: lower --batch-size below that"):
        found = robustness.evaluate(model, images, attack, batch_size, run.state.precision, world, progress, between,
                                  before)
        bar.update(len(images))
        return found


@contextlib.contextmanager
def advised(run: Run, advice: str) -> Iterator[None]:
    """Out of memory, or without a compiler, the run ends with one line that says what would help there."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no class of its own for a CPU's memory.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise Failure(f"out of memory: {advice}") from None
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            if run.signals.received:  # which the compiler's own processes received, too
                raise Stopped(run.signals.received, " while compiling; --resume auto goes on from the newest state",
                              midway=True) from None
            raise Failure(f"--compile: {str(error).partition(chr(10))[0]}; use --no-compile") from None
        raise


def finish_epoch(run: Run, trained: dict[str, Any], measured: dict[str, Any]) -> None:
    """Record and save an epoch that is over."""
    state, args = run.state, run.args
    if not math.isfinite(measured["test_loss"] + measured["test_robust_loss"]):
        raise not_finite(run, state.step - 1)
    score = measured.pop("score")
    record = {"epoch": state.epoch, **trained, **measured, "best": score > state.best}
    state.best = max(state.best, score)
    state.history.append(record)
    record["collapsed"] = collapse.collapsed(state.history)[-1]
    state.begin_epoch(state.epoch + 1)
    if run.world.is_main:
        if not record["collapsed"]:
            states.save(run.folder.file("model", "healthy"), state.judged.state_dict())
        if record["best"]:
            states.save(run.folder.file("model", "best"), state.judged.state_dict())
        if state.epoch % args.chkpt_iters == 0 or state.epoch == args.epochs:
            states.save(run.folder.file("model", state.epoch - 1), state.judged.state_dict())
            states.save(run.folder.file("opt", state.epoch - 1), state.training(args, state.sums))
    save(run)
    run.screen.say(epoch_line(record, state.history, args.epochs))  # last: standard output may be closed
    if record["collapsed"]:
        run.screen.warn(collapse_line(record))


def on_collapse(run: Run) -> None:
    """Stop the run if --on-collapse=stop asks for it."""
    if run.args.on_collapse == "stop":
        healthy = run.folder.file("model", "healthy")
        where = f"the last healthy network is in {healthy}; " if healthy.exists() else ""
        raise Failure(f"collapsed in epoch {run.state.epoch}; {where}to continue anyway: --resume=auto "
                      f"--on-collapse=warn")


def save(run: Run) -> None:
    """Save all that --resume auto needs to go on from here. All processes have to call it together."""
    require_finite(run)
    sums = run.world.sum(run.state.sums)
    if run.world.is_main:
        states.save_state(run.folder, run.state, run.args, sums)
    if run.board:
        run.board.draw(run.state.history)


def require_finite(run: Run) -> None:
    """Raise Failure if a step of this epoch was not finite, or left weights or answers to images that are not."""
    state = run.state
    fault = run.world.min(state.first_fault).item()
    if fault < math.inf:
        raise not_finite(run, int(fault))
    if state.step:
        training = state.model.training
        x, _ = run.test.batch(slice(evaluation_batch(run.args, run.world.device)))
        answers = state.precision.float32_logits(state.model.eval(), x)
        state.model.train(training)
        sound = torch.stack([values.isfinite().all() for values in (*state.model.state_dict().values(), answers)]).all()
        if run.world.max(not sound):
            raise not_finite(run, state.step - 1)


def not_finite(run: Run, step: int) -> Failure:
    good = run.folder.path / "state.pth"
    advice = "lower --lr-max" if run.state.precision.dtype is not torch.float16 else \
        "lower --lr-max, or take --amp-dtype=bfloat16, whose range is wider"
    return Failure(f"the loss, a gradient or a weight is no longer finite in epoch {run.state.epoch + 1}, "
                   f"step {step + 1}; "
                   f"{f'the last good state is {good}' if good.exists() else 'no state was saved before'}: {advice}")


def asked(run: Run) -> dict[str, Any]:
    """The final evaluation that the arguments ask for. There may be no best model: then it is of the last one."""
    args = run.args
    best = args.final_model == "best" and run.folder.file("model", "best").exists()
    return {"model": "best" if best else "last", "iters": args.final_iters, "restarts": args.final_restarts,
            "alpha": args.pgd_alpha, "epsilon": args.epsilon, "epoch": run.state.epoch - 1,
            "images": min(args.final_samples or len(run.test), len(run.test))}


def is_complete(run: Run) -> bool:
    """Whether a run that has no epoch before it has nothing else to do, either."""
    return not run.args.final_iters or bool(run.state.final and asked(run).items() <= run.state.final.items())


def finish(run: Run) -> None:
    """Attack the last or the best network with restarts (PGD-50-10), and record what is left of its accuracy."""
    run.screen.say("# " + summary_line(collapse.summary(run.state.history), len(run.state.history)))
    if not run.args.final_iters:
        return
    found = final_evaluation(run, run.world.decide(lambda: asked(run)))
    run.state.final = {**found, **collapse.summary(run.state.history)}
    save(run)
    if run.world.is_main:
        (run.folder.path / "final.pth").unlink(missing_ok=True)
    run.screen.say(final_line(found))
    if found["no_gradient"] > 0.01:
        run.screen.warn(f"for {100 * found['no_gradient']:.0f}% of the images the attack had no gradient to go by: the "
                        f"network may only look robust; try an attack without gradients, such as Square")


def final_evaluation(run: Run, wanted: dict[str, Any]) -> dict[str, Any]:
    """The final evaluation that `asked` describes."""
    model, began = run.state.judged, time.perf_counter()
    torch.backends.cudnn.benchmark = False  # batches of every size are to come
    if wanted["model"] == "best":
        best = run.folder.file("model", "best")
        model = copy.deepcopy(model)
        load_network(model, run.world.decide(lambda: states.read_checkpoint(best)), best.name)
    key = {**wanted, "seed": run.args.seed, "network": fingerprint(model)}
    part = run.folder.path / "final.pth"
    before = None if run.args.eval else run.world.decide(lambda: broken_off(part, key))
    began -= before[2] if before else 0

    def keep(restart: int, found: Verdict) -> None:
        if run.world.is_main and not run.args.eval:
            states.save(part, {"key": key, "restart": restart, "seconds": time.perf_counter() - began,
                                   "found": vars(found)})

    verdict = judged(run, model, run.test[:wanted["images"]], wanted["iters"], wanted["restarts"], keep=keep,
                     before=before and before[:2])
    return {**wanted, "seconds": time.perf_counter() - began, **verdict.metrics()}


def broken_off(part: Path, key: dict[str, Any]) -> tuple[int, Verdict, float] | None:
    """The restart that a final evaluation of this key was broken off in, what it had found, and in how many seconds."""
    try:
        saved = states.read_checkpoint(part)
        return (saved["restart"], Verdict(**saved["found"]), saved["seconds"]) if saved["key"] == key else None
    except (UsageError, KeyError, TypeError):
        return None


def evaluate_only(run: Run, found: Found) -> None:
    """What --eval does: the evaluation of an epoch on the whole test set, then the final one; all of them are kept."""
    state, args = run.state, run.args
    run.world.decide(lambda: folders.evaluations(run.folder))  # before anything is measured
    epoch = max(state.epoch - 1, 0) if state.step == 0 else state.epoch  # the one under way, or the last
    untrained = dict.fromkeys(("train_time", "lr", "train_robust_loss", "train_robust_acc", "defence_mean"))
    measured = measure(run)
    del measured["score"]
    if not math.isfinite(measured["test_loss"]):
        raise UsageError(f"--eval: what the network in {found.source} answers is no finite number")
    record = {"epoch": epoch, **untrained, **measured, "resumed": found.source,
              **describe(run.world.device, run.world.size)}
    if args.final_iters:
        record["final"] = {**final_evaluation(run, run.world.decide(lambda: asked(run))), "epoch": epoch}
    record["attacks"] = rows(args, record)
    try:
        if run.world.is_main:
            folders.add_evaluation(run.folder, record)
    finally:  # the disk may be full
        run.screen.say(epoch_line(record, [], max(args.epochs, epoch + 1)))
        if args.final_iters:
            run.screen.say(final_line(record["final"]))


def rows(args, record: dict[str, Any]) -> list[dict[str, Any]]:
    """What --eval found in the form that robustness.py records."""
    def row(name: str, epsilon: float, alpha: float | None, accuracy: float, images: int = record["test_images"],
            seconds: float | None = None, file: str = record["resumed"]) -> dict[str, Any]:
        found = robustness.row(name, epsilon, round(accuracy * images), images, seconds)
        return {**found, "alpha": alpha, "file": file}

    pgd = f"pgd-{args.test_iters}-{args.test_restarts}"
    found = [row("clean", 0.0, None, record["test_acc"]), row("fgsm", args.epsilon, args.epsilon, record["fgsm_acc"]),
             row(pgd, args.epsilon, args.pgd_alpha, record["test_robust_acc"])]
    if final := record.get("final"):
        file = str(Path(args.fname, "model_best.pth")) if final["model"] == "best" else record["resumed"]
        found.append(row(f"pgd-{final['iters']}-{final['restarts']}", args.epsilon, args.pgd_alpha,
                         final["robust_acc"], final["images"], final["seconds"], file))
    return found


def schedule(args, dataset: DataSet) -> Callable[[float], float]:
    """The learning rate as a function of the time in epochs."""
    if args.lr_schedule == "cyclic":
        return partial(cyclic, lr_max=args.lr_max, peak=dataset.peak(args.epochs), epochs=args.epochs)
    if args.lr_schedule == "onedrop":
        return partial(onedrop, lr_max=args.lr_max, drop=args.lr_drop)
    return partial(onecycle, lr_max=args.lr_max, epochs=args.epochs)


def cyclic(t: float, lr_max: float, peak: float, epochs: float) -> float:
    """Linear from 0 to `lr_max` at `peak`, and back to 0 at `epochs`."""
    if t < peak:
        return lr_max * (t / peak)
    return lr_max * ((epochs - t) / (epochs - peak))


def onedrop(t: float, lr_max: float, drop: float) -> float:
    """`lr_max`, and a tenth of it from `drop` on."""
    return lr_max if t < drop else lr_max / 10


def onecycle(t: float, lr_max: float, epochs: float) -> float:
    """From lr_max / 25 up to `lr_max` in three tenths of the epochs and down to lr_max / 250,000, along cosines.

    PyTorch's OneCycleLR (Smith and Topin, arXiv 1708.07120).
    """
    return _cosines(t / epochs, lr_max / 25, lr_max, lr_max / 250_000)


def onecycle_momentum(t: float, epochs: float) -> float:
    """The momentum that goes with it, as in PyTorch: from 0.95 down to 0.85 and back."""
    return _cosines(t / epochs, 0.95, 0.85, 0.95)


def _cosines(share: float, begin: float, peak: float, end: float) -> float:
    """`begin` to `peak` in three tenths of the time, then to `end`."""
    if share < 0.3:
        return peak + (begin - peak) * (1 + math.cos(math.pi * share / 0.3)) / 2
    return end + (peak - end) * (1 + math.cos(math.pi * (share - 0.3) / 0.7)) / 2
