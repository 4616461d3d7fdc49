"""One run from the command line to its last file: what every training script does once it has stated its data set."""
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from tqdm import tqdm

import attacks
import options
from data import DataSet, Images, load
from device import choose_device, compile_network, hardware, memory_format, to_compile
from distributed import World
from engine import NotFinite, Progress, Trainer, closing_attack, evaluate, float32_logits, require_finite, train_epoch
from folder import RunFolder, load_model, load_training_state, read_checkpoint, require_same_run
from precision import Precision, prepare_momentum
from utils import UsageError, seed_everything

# In training, many processes agree on whether to stop once in so many steps or seconds, whichever is sooner, and at an
# epoch's last step. (torchrun kills them 30 seconds after SIGTERM.)
STOP_STEPS, STOP_SECONDS = 20, 5
EVALUATION_BATCH = 128  # the most images that a process evaluates at once; --batch-size is that of all processes
ORDER_FLAGS = ("batch_size", "seed", "train_samples", "val_size", "dummy")  # they decide which images a step is on


def main(dataset: DataSet, description: str | None = None, argv: list[str] | None = None) -> None:
    """Train or evaluate on `dataset` as `argv` (if None, the command line) asks; an error ends the process."""
    parser = options.parser(dataset, description)
    args = parser.parse_args(argv)
    signals, world, folder = StopSignals(), World(), None
    try:
        options.check(args)
        device = choose_device(args)
        world = World.join(device)
        folder = RunFolder(args.fname, args.eval, validated=dataset.validate or args.val_size > 0)
        work = Run(dataset, args, options.flag_of(parser), folder, device, world, signals)
        signals.listen()
        if args.eval:
            work.evaluate_only()
        else:
            work.train()
        world.barrier()  # one that leaves early would break the others' connections
        world.leave()
    except UsageError as error:
        parser.error(str(error))
    except Stopped:
        world.leave()
        how = "" if args.eval else "; --resume auto goes on from here"
        parser.exit(128 + signals.received, f"{parser.prog}: stopped by {signals.received.name}{how}\n")
    except KeyboardInterrupt:  # before there was anything to save
        parser.exit(128 + signal.SIGINT, f"{parser.prog}: stopped by SIGINT\n")
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            parser.exit(1, f"{parser.prog}: error: out of memory: lower --batch-size (now {args.batch_size})\n")
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):  # there is no C++ compiler, say
            if signals.received:  # which the compiler's own processes received, too
                parser.exit(128 + signals.received, f"{parser.prog}: stopped by {signals.received.name} while "
                                                    f"compiling; --resume auto goes on from the newest state\n")
            reason = str(error).partition("\n")[0]
            parser.exit(1, f"{parser.prog}: error: --compile: {reason}; use --no-compile\n")
        raise
    except NotFinite as fault:
        parser.exit(1, f"{parser.prog}: error: {work.explain(fault)}\n")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python, at its end, would fail again
        parser.exit(1, f"{parser.prog}: error: standard output was closed; --resume auto goes on\n")
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: {error.filename or args.fname}: {error.strerror or error}\n")
    finally:
        if folder:
            folder.release()


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out on the device or, for which PyTorch has no class of its own, on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


class Stopped(Exception):
    """A signal asked the run to end."""


class StopSignals:
    """Notes SIGINT and SIGTERM, for the loops to obey between two steps; alone, a second one acts at once."""

    def __init__(self):
        self.received: signal.Signals | None = None

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.received = signal.Signals(number)
        if "WORLD_SIZE" not in os.environ:  # a scheduler and torchrun may both pass on the same signal
            signal.signal(number, signal.SIG_DFL)


class Run:
    """A run made ready: until everything that it needs is known to be there, it writes nothing."""

    def __init__(self, dataset: DataSet, args, flag_of: dict[str, str], folder: RunFolder, device: torch.device,
                 world: World, signals: StopSignals):
        self.dataset, self.args, self.device, self.world, self.signals = dataset, args, device, world, signals
        self.folder, self.epsilon, self.pgd_alpha = folder, args.epsilon / 255, args.pgd_alpha / 255
        folder.require_writable()
        self.precision = Precision(args.amp, args.amp_dtype, args.amp_impl, device, args.tf32)
        if args.tf32 and device.type != "cuda":
            raise UsageError("--tf32 is for CUDA: a CPU's float32 has no lesser one")
        if args.sync_bn and (world.size == 1 or device.type != "cuda"):
            raise UsageError("--sync-bn is for several processes on CUDA, under torchrun")
        if world.is_main:
            folder.claim()
        world.barrier()
        found = self.folder.find(args.resume) if args.resume else None
        if args.eval and found is None:
            raise UsageError(f"--eval: --fname {args.fname} holds no model to evaluate")
        if found:
            self.folder.require_readable_logs()
        self.make_network()
        self.progress, self.source, self.from_state = Progress(), None, False
        if found:
            self.resume(found, flag_of)
        train = self.load_images()
        if not world.agree([self.progress.epoch, self.progress.step], device):
            raise UsageError(f"--fname {args.fname} has to be the same folder for all processes")
        self.make_trainer(train)
        world.barrier()  # every process has read what the first may set aside from here on
        if world.is_main:
            self.folder.make()

    def make_network(self) -> None:
        """The network that the seed gives, on the device, and its optimizer."""
        args, dataset = self.args, self.dataset
        seed_everything(args.seed)
        model = options.MODELS[args.model](args, num_classes=dataset.classes, mean=dataset.mean, std=dataset.std)
        if args.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.layout = memory_format(model, self.device)
        if args.compile and self.layout == torch.contiguous_format:  # the compiler would choose channels_last by itself
            raise UsageError("--compile on a CPU needs --base-width 16 or more")
        self.model = model.to(self.device, memory_format=self.layout)
        self.optimizer = torch.optim.SGD(model.parameters(), args.lr_max, momentum=0.9, weight_decay=5e-4, fused=True)
        prepare_momentum(self.optimizer)
        self.precision.prepare(model, self.optimizer)

    def resume(self, found: tuple[dict, dict | None, int | None, str], flag_of: dict[str, str]) -> None:
        """Load the checkpoint that `RunFolder.find` found."""
        args = self.args
        model_state, training_state, epoch, self.source = found
        load_model(self.model, model_state, self.source)
        before = {}
        if training_state is not None:
            self.progress, before = load_training_state(self.optimizer, self.precision, training_state, self.source)
        self.from_state = epoch is None
        if not self.from_state:
            self.progress.epoch = epoch
            self.progress.restart_epoch()
        if before.get("data_set", args.data_set) != args.data_set:
            raise UsageError(f"--resume: {self.source} is of a run on {before['data_set']}, not {args.data_set}")
        if args.eval:
            return
        if self.progress.epoch > args.epochs:
            raise UsageError(f"--resume: {self.source} has {self.progress.epoch} epochs behind it, more than --epochs "
                             f"{args.epochs}")
        if not args.allow_changes:
            require_same_run(before, args, flag_of)
        if any(before.get(name, vars(args)[name]) != vars(args)[name] for name in ORDER_FLAGS):
            self.progress.restart_epoch()

    def load_images(self) -> Images:
        """Bring all images to the device; returns those to train on."""
        args, world, progress = self.args, self.world, self.progress
        if not world.is_main:
            world.barrier()  # while the first process downloads what is missing
        train, held_out, test = load(self.dataset, args)
        if world.is_main:
            world.barrier()
        if (len(train) - 1) % args.batch_size + 1 < world.size:
            raise UsageError(f"--train-samples or --batch-size leaves fewer images in the last batch than the "
                             f"{world.size} processes")
        if progress.sums[2] != min(progress.step * args.batch_size, len(train)) and not args.eval:
            raise UsageError(f"--resume: {self.source} has not trained on as many images as its steps say: it is "
                             f"damaged")
        train, held_out, self.test = (images.to(self.device, self.layout) for images in (train, held_out, test))
        self.validation = held_out if args.val_size else first_batches(train, args.batch_size, 50)
        return train

    def make_trainer(self, images: Images) -> None:
        """Compile the network, join it with those of the other processes, and make ready to train on `images`."""
        args, model = self.args, self.model
        if not self.world.is_main:
            self.progress.sums.zero_()  # the saved sums are those of all processes
        self.compiles = to_compile(args, self.device)
        if self.compiles:
            compile_network(model, args.compile_mode)
        forward = model
        if self.world.size > 1:
            forward = nn.parallel.DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)
        self.trainer = Trainer(model, forward, self.optimizer, attacks.from_args(args),
                               options.SCHEDULES[args.lr_schedule](args, self.dataset), images,
                               self.dataset.augmentation, args.batch_size, args.seed, self.precision, self.world)

    def train(self) -> None:
        """Train from where the run stands to the last epoch, then attack the final model."""
        if self.source and self.progress.epoch == self.args.epochs and self.closed():
            return self.say(f"{self.args.fname} is complete: nothing to do")
        if self.world.is_main:
            self.open()
        if self.precision.dtype is torch.bfloat16 and self.device.type == "cpu" and \
                torch.backends.cpu.get_cpu_capability() == "AVX2":
            self.say("# without AVX-512, this processor is slow in bfloat16: better leave --amp out")
        self.say("\t".join(self.folder.titles))
        steps = self.trainer.steps
        # Steps since the processes last agreed on whether to stop, that moment, and how many steps may be between.
        self.unchecked, self.checked_at, self.check_every = 0, time.perf_counter(), 1
        self.bar = tqdm(total=self.args.epochs * steps, initial=self.progress.epoch * steps + self.progress.step,
                        unit="step", disable=None if self.world.is_main else True, dynamic_ncols=True)
        with self.bar:
            while self.progress.epoch < self.args.epochs:
                self.bar.set_description(f"epoch {self.progress.epoch}")
                try:
                    trained = train_epoch(self.trainer, self.progress, self.after_step)
                    self.require_sound_network()
                    self.finish_epoch({"epoch": self.progress.epoch, **trained, **self.measure()})
                except Stopped:
                    self.save_state()
                    raise
        self.close("final.json", epoch=self.progress.epoch - 1)

    def open(self) -> None:
        """Prepare the folder for the epochs to come, and write down what is about to run."""
        self.folder.clear_unfinished()
        if self.source is None:
            aside = self.folder.set_aside()
        else:
            stale = self.folder.best_epoch() >= self.progress.epoch  # of an epoch that is now made again
            aside = self.folder.rewind(self.progress.epoch, keep_files=self.from_state)
            if stale or not self.folder.model_file("best").exists():
                self.progress.best = Progress().best
            self.note(f"# resumed at epoch {self.progress.epoch}, step {self.progress.step} from {self.source}")
        if aside:
            self.note(f"# files of an earlier run are now in {aside}")
        before = self.folder.read_json("args.json") if self.source else None
        self.folder.write_json("args.json", {"data_set": self.dataset.name, "args": vars(self.args), "starts": [
            *(before or {}).get("starts", []), describe_machine(self.device, self.world)]})

    def after_step(self) -> None:
        self.bar.update()
        if self.args.chkpt_steps and self.progress.step % self.args.chkpt_steps == 0:
            self.save_state()
        self.unchecked += 1
        if self.world.size == 1:
            self.stop_if_asked()
        elif self.unchecked >= self.check_every or self.progress.step == self.trainer.steps:
            self.stop_if_asked()
            now = time.perf_counter()
            pace = self.world.max((now - self.checked_at) / self.unchecked, self.device)
            self.check_every = max(1, min(STOP_STEPS, int(STOP_SECONDS / pace)))
            self.unchecked, self.checked_at = 0, now

    def stop_if_asked(self) -> None:
        """Stop if a signal came, to whichever process. All processes have to call it together."""
        if self.world.max(self.signals.received is not None, self.device):
            self.signals.received = self.signals.received or signal.SIGTERM
            raise Stopped

    @property
    def evaluation_batch(self) -> int:
        """Images that a process evaluates at once: it has to have room for them, and a GPU enough to do."""
        return min(self.args.batch_size, EVALUATION_BATCH)

    def measure(self) -> dict[str, Any]:
        """The evaluation of the present model that every epoch ends with, and what it took."""
        args, began = self.args, time.perf_counter()
        last = args.eval or self.progress.epoch + 1 == args.epochs
        test = self.test if args.full_test or last else first_batches(self.test, args.batch_size, 10)
        pgd = partial(attacks.pgd, epsilon=self.epsilon, alpha=self.pgd_alpha, steps=args.test_iters)

        def evaluated(images: Images, part: int) -> dict[str, float]:
            return evaluate(self.model, images, pgd, args.test_restarts, self.evaluation_batch,
                            (args.seed, self.progress.epoch, part), self.precision, self.world, self.stop_if_asked)

        metrics = evaluated(test, 0)
        if self.folder.validated:
            validation = evaluated(self.validation, 1)
            metrics |= {"val_robust_acc": validation["test_robust_acc"], "val_images": validation["test_images"]}
        if self.device.type == "cuda":
            metrics["peak_memory"] = torch.cuda.max_memory_allocated(self.device)
        return {**metrics, "test_time": time.perf_counter() - began}

    def finish_epoch(self, metrics: dict[str, Any]) -> None:
        """Log and save an epoch that is over, its log line first: a run that goes on can tell one too many."""
        args, progress = self.args, self.progress
        if not math.isfinite(metrics["test_loss"] + metrics["test_robust_loss"]):
            raise NotFinite(progress.step - 1)
        score = metrics["val_robust_acc" if self.folder.validated else "test_robust_acc"]
        metrics["best"] = score > progress.best
        progress.best = max(progress.best, score)
        progress.next_epoch()
        if self.world.is_main:
            line = self.folder.add_epoch(metrics)
            if metrics["best"]:
                self.folder.save_model("best", self.model)
            if progress.epoch % args.chkpt_iters == 0 or progress.epoch == args.epochs:
                self.folder.save_model(progress.epoch - 1, self.model)
                self.folder.save_optimizer(progress.epoch - 1, self.optimizer, self.precision, progress, args)
        self.save_state()
        if self.world.is_main:
            self.say(line)  # last: standard output may be closed

    def save_state(self) -> None:
        """Save all that --resume auto needs to go on from here. All processes have to call it together."""
        require_finite(self.progress, self.world)
        if self.progress.step:
            self.require_sound_network()
        progress = replace(self.progress, sums=self.world.sum(self.progress.sums))
        if self.world.is_main:
            self.folder.save_state(self.model, self.optimizer, self.precision, progress, self.args)

    def require_sound_network(self) -> None:
        """Raise NotFinite if the last step left weights, or answers to test images, that are no finite numbers."""
        training = self.model.training
        x, _ = self.test.batch(slice(self.evaluation_batch))
        # Not compiled: who stops does not wait for that.
        answers = float32_logits(self.model.eval().forward, x, self.precision)
        self.model.train(training)
        sound = torch.stack([values.isfinite().all() for values in (*self.model.state_dict().values(), answers)]).all()
        if self.world.max(not sound, self.device):
            raise NotFinite(self.progress.step - 1)

    def closed(self) -> bool:
        """Whether the closing attack that the arguments ask for has been made."""
        final = self.folder.read_json("final.json") or {}
        args = self.args
        asked = {"iters": args.final_iters, "restarts": args.final_restarts, "images": self.final_images,
                 "alpha": args.pgd_alpha, "epsilon": args.epsilon, "model": self.final_model, "epoch": args.epochs - 1}
        return asked.items() <= final.items()

    @property
    def final_images(self) -> int:
        return min(self.args.final_samples or len(self.test), len(self.test))

    @property
    def final_model(self) -> str:
        """Which model the closing attack is on: "best" where it is asked for and there is one."""
        there = self.folder.model_file("best").exists()
        return "best" if self.args.final_model == "best" and there else "last"

    def close(self, name: str, **more: Any) -> None:
        """Attack the last or the best model with restarts (PGD-50-10), log it and write it and `more` to `name`."""
        args, began = self.args, time.perf_counter()
        self.world.barrier()  # for the first process to have written the best model
        which = self.final_model
        if which == "best":
            load_model(self.model, read_checkpoint(self.folder.model_file("best")), "model_best.pth")
            self.precision.clear_cast_cache()
        if self.compiles:  # anew: batches of every size are to come, for which one graph is enough
            torch.compiler.reset()
            self.model.compile()
        torch.backends.cudnn.benchmark = False  # likewise: each size would be timed anew
        with tqdm(total=self.final_images, desc=f"PGD-{args.final_iters}-{args.final_restarts}", unit="image",
                  disable=None if self.world.is_main else True, dynamic_ncols=True) as bar:
            def progress(images_done: int) -> None:
                bar.update(images_done)
                if self.world.size == 1:  # many are not at the same step
                    self.stop_if_asked()

            result = closing_attack(self.model, self.test[:self.final_images], self.epsilon, self.pgd_alpha,
                                    args.final_iters, args.final_restarts, self.evaluation_batch, args.seed,
                                    self.precision, self.world, progress, self.stop_if_asked)
        seconds = time.perf_counter() - began
        line = "\t".join([f"PGD{args.final_iters}", f"time: {seconds:.1f}",
                          *(f"{key.replace('_', ' ')}: {result[key]:.4f}" for key in
                            ("clean_loss", "clean_acc", "robust_loss", "robust_acc"))])
        if self.world.is_main:
            self.folder.add_line(line)
            self.folder.write_json(name, {
                "model": which, "iters": args.final_iters, "restarts": args.final_restarts, "alpha": args.pgd_alpha,
                "epsilon": args.epsilon, "seconds": seconds, **result, **more})
        self.say(line)

    def evaluate_only(self) -> None:
        """What --eval does: the evaluation of an epoch on the whole test set, then the closing attack."""
        if self.progress.step == 0:  # no epoch is under way
            self.progress.epoch = max(self.progress.epoch - 1, 0)
        self.say("\t".join(self.folder.titles))
        untrained = dict.fromkeys(("train_time", "lr", "train_robust_loss", "train_robust_acc", "defence_mean"))
        metrics = {"epoch": self.progress.epoch, **untrained, **self.measure()}
        if not math.isfinite(metrics["test_loss"]):
            raise UsageError(f"--eval: what the network in {self.source} answers is no finite number")
        if self.world.is_main:
            self.say(self.folder.add_epoch(metrics))
        self.close("eval.json", epoch=self.progress.epoch, resumed=self.source,
                   **describe_machine(self.device, self.world))

    def explain(self, fault: NotFinite) -> str:
        good = self.folder.state_file
        return (f"the loss, a gradient or a weight is no longer finite at epoch {self.progress.epoch}, step "
                f"{fault.step}; {f'the last good state is {good}' if good.exists() else 'no state was saved before'}: "
                f"lower --lr-max")

    def note(self, text: str) -> None:
        """Say something that belongs into the log, too, between its lines."""
        self.folder.add_line(text)
        self.say(text)

    def say(self, text: str) -> None:
        if self.world.is_main:
            tqdm.write(text)
            sys.stdout.flush()


def first_batches(images: Images, batch_size: int, part: int) -> Images:
    """Batches 0 to floor(n / part) of the n batches of `images`: about a `part`-th of them."""
    return images[:(math.ceil(len(images) / batch_size) // part + 1) * batch_size]


def describe_machine(device: torch.device, world: World) -> dict[str, Any]:
    """What a figure has to stand with: versions, hardware and the commit of this code."""
    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, text=True,
                                   capture_output=True)
        commit = described.stdout.strip() or None
    except OSError:  # there is no git
        commit = None
    return {"commit": commit, "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "device": hardware(device), "threads": torch.get_num_threads(),
            "processes": world.size, "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}
