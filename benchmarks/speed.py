"""Compare the speed of this package with a plain version of the authors' scripts (published_style.py).

    python benchmarks/speed.py                                         # float32, full width
    python benchmarks/speed.py --amp --json benchmarks/results/gpu.json
    python benchmarks/speed.py --rounds 3 --eval-iters 10 --eval-restarts 2 --eval-images 64    # on a CPU
    python benchmarks/speed.py --peer                # pip install torchattacks adversarial-robustness-toolbox

The command times the training step, data loading and the final evaluation. Both sides run in this process and alternate
in every round, so that a drifting clock speed affects both; a ratio is the median over the rounds. The peak is that of
a matrix product in the same precision, measured here; the work of a training step is counted. Flags of train_cifar.py
(network, batch, precision, device) set the configuration. The baseline has the same network and PyTorch's defaults: on
CUDA, float32 convolutions in TF32, as this package without --no-tf32. --peer adds, if they are installed, torchattacks
(a plain loop with the baseline's data) and ART's trainer of FGSM-RS (its own data without augmentation, the network in
eval mode), both in the precision of this package.
"""
import contextlib
import io
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import published_style as published
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from singlestep import attacks, options, train
from singlestep.data import Images
from singlestep.options import CIFAR10
from singlestep.robustness import PGD, attack_steps
from singlestep.run.console import StopSignals, UsageError, one_line_errors
from singlestep.run.device import Precision, choose_device, describe, keep_freed_memory
from singlestep.run.distributed import World
from singlestep.run.folder import Folder, atomic_write

ROOT = Path(__file__).resolve().parent.parent
EPSILON, PGD_ALPHA = 8 / 255, 2 / 255

# Attack by name: ours, the baseline's.
ATTACKS = {
    "fgsm": (partial(attacks.fgsm, alpha=2 * EPSILON), partial(published.fgsm, alpha=2 * EPSILON)),
    "zerograd": (partial(attacks.zerograd, alpha=2 * EPSILON, q=0.35),
                 partial(published.zerograd, alpha=2 * EPSILON, q=0.35)),
    "multigrad": (partial(attacks.multigrad, alpha=2 * EPSILON),
                  partial(published.multigrad, alpha=2 * EPSILON, samples=3, parallel=False)),
    "multigrad parallel": (partial(attacks.multigrad, alpha=2 * EPSILON, parallel=True),
                           partial(published.multigrad, alpha=2 * EPSILON, samples=3, parallel=True)),
    "pgd-10": (partial(attacks.pgd, alpha=PGD_ALPHA, steps=10), partial(published.pgd, alpha=PGD_ALPHA, steps=10)),
}


# Attack by name: torchattacks' class, and its keywords.
TORCHATTACKS = {"fgsm": ("FFGSM", dict(eps=EPSILON, alpha=2 * EPSILON)),
                "pgd-10": ("PGD", dict(eps=EPSILON, alpha=PGD_ALPHA, steps=10))}
PEERS = {"torchattacks": "torchattacks", "art": "adversarial-robustness-toolbox"}  # the package of each module


def seconds(work, device) -> float:
    """Return the wall-clock seconds of `work()`, until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def as_alone(ours: bool, precision: Precision) -> None:
    """Set the process-wide settings (allocator, TF32, kernel search) that this side has in a process of its own."""
    if precision.device.type == "cpu":
        keep_freed_memory(ours)
    else:
        torch.backends.cudnn.allow_tf32 = precision.tf32 or not ours
        torch.backends.cudnn.benchmark = not ours  # ours turns it on in its training steps


def turn(work, precision: Precision, ours: bool) -> float:
    """Return the seconds of `work()` with this side's process-wide settings; on a CPU, after a warm-up call."""
    as_alone(ours, precision)
    if precision.device.type == "cpu":
        work()
    return seconds(work, precision.device)


def side_by_side(sides: dict[str, Callable[[], None]], precision: Precision, rounds: int) -> list[dict[str, float]]:
    """Time all sides in turn, after a warm-up round. Returns per round: seconds by side, `matrix_product` in FLOP/s."""
    return [{**{name: turn(work, precision, name == "ours") for name, work in sides.items()},
             "matrix_product": peak_flops(precision)} for _ in range(rounds + 1)][1:]


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def torchattacks_attack(attack: str, model: nn.Module) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Return torchattacks' attack with the baseline's signature; in train mode, as all attacks here."""
    import torchattacks

    name, keywords = TORCHATTACKS[attack]
    perturb = getattr(torchattacks, name)(model, **keywords)
    perturb.set_model_training_mode(model_training=True, batchnorm_training=True)
    return lambda model, x, y: perturb(x, y) - x


def art_epoch(model: nn.Module, optimizer, x: Tensor, y: Tensor, batch_size: int) -> Callable[[], None]:
    """Return a function that trains for an epoch with ART's trainer of FGSM-RS. The network ends in eval mode."""
    from art.defences.trainer import AdversarialTrainerFBFPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, optimizer, clip_values=(0, 1),
                                   device_type="gpu" if next(model.parameters()).is_cuda else "cpu")
    trainer = AdversarialTrainerFBFPyTorch(classifier, eps=EPSILON)
    images, labels = x.numpy(), nn.functional.one_hot(y, 10).numpy()

    def epoch() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its bar
            trainer.fit(images, labels, batch_size=batch_size, nb_epochs=1)

    return epoch


def start_up(rounds: int, device: torch.device) -> dict[str, float]:
    """Return the least seconds over the rounds until --help is printed, and until a synthetic run's first step."""
    first_step = ("import sys; from singlestep import options, train; train.train_epoch = lambda *_: sys.exit(); "
                  "train.main(options.CIFAR10, options.parse(options.CIFAR10))")
    with tempfile.TemporaryDirectory() as folder:
        commands = {"--help": ["train_cifar.py", "--help"],
                    "first step": ["-c", first_step, "--dummy", "--base-width=16", f"--fname={folder}/run",
                                    f"--device={device.type}"]}

        def start(name: str) -> None:
            subprocess.run([sys.executable, *commands[name]], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)

        return {name: min(seconds(partial(start, name), torch.device("cpu")) for _ in range(rounds))
                for name in commands}


def peak_flops(precision: Precision) -> float:
    """Return the FLOP/s of a large matrix product in the precision of our convolutions: the best of four."""
    device = precision.device
    n = 8192 if device.type == "cuda" else 3072
    a, b = torch.randn(2, n, n, device=device).to(precision.dtype)
    torch.backends.cuda.matmul.allow_tf32 = precision.tf32
    a @ b
    best = min(seconds(lambda: a @ b, device) for _ in range(4))
    torch.backends.cuda.matmul.allow_tf32 = False  # PyTorch's default, of which the networks' last layer is
    return 2 * n**3 / best


def peak_memory(device) -> int:
    """Return the peak memory so far, in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def save(result: dict, path: str | None) -> None:
    """Write the results so far to `path`, unless it is None."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())


def main() -> None:
    p = options.Parser(__doc__)
    add = p.add_argument
    add("--rounds", type=options.number(int, 1), default=5, help="rounds")
    add("--steps", type=options.number(int, 1), help="training steps per round (default: 20 on CUDA, 1 on CPU)")
    add("--attacks", nargs="*", default=list(ATTACKS), choices=list(ATTACKS), help="attacks to time")
    add("--eval-iters", type=options.number(int, 1), default=50, help="PGD steps in an evaluation")
    add("--eval-restarts", type=options.number(int, 1), default=10, help="PGD restarts in an evaluation")
    add("--eval-images", type=options.number(int, 0), default=1024, help="images to attack; 0: no evaluation")
    add("--eval-rounds", type=options.number(int, 1), default=1, help="rounds of each evaluation")
    add("--peer", action="store_true", help="also time torchattacks in a plain loop and ART's trainer")
    add("--json", type=options.path, help="JSON file for the measured times")
    own, argv = p.parse_known_args()
    args = options.parse(CIFAR10, argv=["--lr-max=0.01", *argv])
    vars(args).update(vars(own))
    with one_line_errors():
        args.peers = [name for name, package in PEERS.items() if args.peer and installed(package)]
        if args.peer and not args.peers:
            raise UsageError(f"--peer needs at least one of these packages: pip install {' '.join(PEERS.values())}")
        if args.json:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)  # before an hour of measurements
        measure(args)


def measure(args) -> None:
    device = choose_device(args)
    state, layout = train.build(CIFAR10, args, device, World(device=device))
    ours, precision, b = state.model.train(), state.precision, args.batch_size
    steps = args.steps or (20 if device.type == "cuda" else 1)
    pixels, labels = torch.randint(256, (b * steps, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (b * steps,))
    images = Images(pixels, labels).to(device, layout)
    # An epoch ends with an evaluation on test images, which is no part of a training step: use one image.
    run = train.assemble(CIFAR10, args, state, Folder(args.fname), World(device=device), StopSignals(),
                         [images, images[:0], images[:1]])
    their_loader = published.loader(pixels.numpy(), labels.numpy(), b, device)
    theirs, looped, arts = (train.new_network(CIFAR10, args).to(device).train() for _ in range(3))
    optimizers = {model: torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
                  for model in (theirs, looped, arts)}
    result = {**describe(device), "dtype": str(precision.dtype), "tf32": precision.tf32,
              "compile": args.compile and args.compile_mode, "base_width": args.base_width, "batch_size": b,
              "steps_a_round": steps, "step": {}}
    print(f"{result['device']}, {result['threads']} threads, torch {torch.__version__}, {precision.dtype}, "
          f"width {args.base_width}, batch {b}; medians of {args.rounds} rounds of {steps} steps\n")
    print(f"{'step with data':20s} {'images/s':>9s} {'published':>9s} {'ratio':>6s} {'lowest':>7s} {'highest':>7s} "
          f"{'GFLOP/image':>11s} {'of peak':>8s} {'50,000 images, s':>17s}")
    for attack in args.attacks:
        mine, published_attack = ATTACKS[attack]
        attacked, published_attack = replace(run, attack=mine), partial(published_attack, epsilon=args.epsilon / 255)

        def our_steps(run=attacked):
            state.begin_epoch(0)
            train.train_epoch(run)

        def their_steps(model=theirs, attack=published_attack):
            for x, y in their_loader:
                published.train_step(model, optimizers[model], attack, x.to(device).float(), y.to(device).long())

        arts_epoch = None
        if "art" in args.peers and attack == "fgsm":
            arts_epoch = art_epoch(arts, optimizers[arts], pixels.permute(0, 3, 1, 2) / 255, labels, b)

        def torchattacks_steps(attack=attack):
            with precision.autocast():
                their_steps(looped, torchattacks_attack(attack, looped))

        def art_steps(epoch=arts_epoch):
            with precision.autocast():
                epoch()

        # torch.compile would never compile functions that it first sees inside a dispatch mode.
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            our_steps()
        work = counter.get_total_flops() / (b * steps)
        sides = {"ours": our_steps, "published": their_steps}
        if "torchattacks" in args.peers and attack in TORCHATTACKS:
            sides["torchattacks"] = torchattacks_steps
        if arts_epoch:
            sides["art"] = art_steps
        rounds = side_by_side(sides, precision, args.rounds)
        mine_s, theirs_s = (statistics.median(r[side] for r in rounds) for side in ("ours", "published"))
        ratios = [r["published"] / r["ours"] for r in rounds]
        share = statistics.median(work * b * steps / r["ours"] / r["matrix_product"] for r in rounds)
        speed, published_speed = b * steps / mine_s, b * steps / theirs_s
        result["step"][attack] = {"images_per_second": speed, "published": published_speed,
                                  "ratio": statistics.median(ratios), "gflop_per_image": work / 1e9,
                                  "share_of_peak": share, "rounds": rounds}
        print(f"{attack:20s} {speed:9.1f} {published_speed:9.1f} {statistics.median(ratios):6.2f} {min(ratios):7.2f} "
              f"{max(ratios):7.2f} {work / 1e9:11.2f} {share:8.1%} {50_000 / speed:17.1f}", flush=True)
        result["step"][attack]["peers"] = {
            f"{name} {version(PEERS[name])}": statistics.median(r[name] / r["ours"] for r in rounds)
            for name in args.peers if name in sides}
        for name, ratio in result["step"][attack]["peers"].items():
            print(f"{'':20s} {ratio:.2f} times as fast as {name}", flush=True)
        save(result, args.json)
        if attack == "zerograd":
            step_s = mine_s / steps

    if "zerograd" in args.attacks:
        index = torch.randperm(len(images))[:b].to(device)
        drawn = {key: value.to(device) for key, value in run.augmentation.draw(b).items()}
        data_s = statistics.median(seconds(lambda: images.batch(index, run.augmentation, drawn), device)
                                   for _ in range(9))
        result["data_share_of_zerograd_step"] = data_s / step_s
        print(f"\ndata and augmentation: {1e3 * data_s:.2f} ms a batch, {data_s / step_s:.2%} of a ZeroGrad step")

    if args.eval_images:
        evaluation(args, ours, theirs, layout, precision, result)
    result["start_up_seconds"] = start_up(args.rounds, device)
    print("\nstart-up: {--help:.1f} s to --help's answer, {first step:.1f} s to the first step".format(
        **result["start_up_seconds"]))
    result["peak_memory_bytes"] = peak_memory(device)
    print(f"\npeak memory, all sides: {result['peak_memory_bytes'] / 2**30:.2f} GiB")
    save(result, args.json)


def evaluation(args, ours, theirs, layout, precision, result) -> None:
    """Time PGD-10 and the final evaluation of an untrained network; about half of its images are robust.

    Three evaluators: ours, which replaces misclassified images in the batch; ours on whole batches, checked at the end
    of a restart; and the baseline's.
    """
    device = precision.device
    ours.load_state_dict(theirs.eval().state_dict())
    ours.eval()
    images = Images(torch.randint(256, (args.eval_images, 32, 32, 3), dtype=torch.uint8),
                    torch.zeros(args.eval_images, dtype=torch.long)).to(device, layout)

    def robust_accuracy(images: Images, **attack) -> float:
        *_, last = attack_steps(ours, images, PGD(**attack), args.batch_size, precision)
        return last.result.metrics()["robust_acc"]

    x, _ = images.batch(slice(None))
    with torch.no_grad():
        images.labels = torch.cat([theirs(part).argmax(dim=1) for part in x.split(args.batch_size)])
    low, high = 1e-6, 0.1
    for _ in range(8):
        epsilon = math.sqrt(low * high)
        robust = robust_accuracy(images[:128], epsilon=epsilon, alpha=epsilon / 4, steps=10, restarts=3)
        low, high = (epsilon, high) if robust > 0.5 else (low, epsilon)
    print(f"\n{'evaluation':20s} {'seconds':>9s} {'whole batches':>13s} {'published':>9s} {'ratio':>6s}  broken images")
    for iters, restarts in dict.fromkeys(((10, 1), (args.eval_iters, args.eval_restarts))):
        attack = dict(epsilon=epsilon, alpha=epsilon / 4, steps=iters, restarts=restarts)
        ways = {
            "ours": lambda attack=attack: robust_accuracy(images, **attack),
            "whole batches": lambda attack=attack: whole_batches(ours, images, attack, args.batch_size, precision),
            "published": lambda attack=attack: published.evaluate(
                theirs, x.contiguous(), images.labels, **attack, batch_size=args.batch_size)}
        robust, taken = {}, {name: [] for name in ways}

        def timed(name, way, robust=robust):
            robust[name] = way()

        for _ in range(args.eval_rounds):
            for name, way in ways.items():
                as_alone(name != "published", precision)
                if device.type == "cuda" and not taken[name]:
                    timed(name, way)  # choose kernels
                taken[name].append(seconds(partial(timed, name, way), device))
        ratio = statistics.median(b / a for a, b in zip(taken["ours"], taken["published"]))
        medians = {name: statistics.median(values) for name, values in taken.items()}
        name = f"pgd-{iters}-{restarts}"
        result[name] = {"seconds": medians, "ratio": ratio, "images": args.eval_images, "robust": robust}
        save(result, args.json)
        print(f"{name:20s} {medians['ours']:9.1f} {medians['whole batches']:13.1f} {medians['published']:9.1f} "
              f"{ratio:6.2f}  {1 - robust['ours']:.0%} of {args.eval_images}", flush=True)


def whole_batches(model, images: Images, attack: dict, batch_size: int, precision) -> float:
    """Return the PGD accuracy by our attack on whole batches, misclassified images included."""
    right = 0
    for first in range(0, len(images), batch_size):
        x, y = images.batch(slice(first, first + batch_size))
        with precision.autocast():
            delta = attacks.pgd(model, x, y, **attack, early_stop=True)
        right += (precision.float32_logits(model, x + delta).argmax(dim=1) == y).sum().item()
    return right / len(images)


if __name__ == "__main__":
    main()
