"""How fast the training step, the data and the closing attack are, beside the published way, in one process.

    python benchmarks/speed.py                                         # float32, full width
    python benchmarks/speed.py --amp --json benchmarks/results/gpu.json
    python benchmarks/speed.py --rounds 3 --eval-iters 10 --eval-restarts 2 --eval-images 64    # on a CPU

The two sides take turns, so that a machine whose speed drifts slows both; a ratio is the median over the rounds. The
peak is that of a matrix product of the same precision, measured here; the work of a step is counted, not assumed. The
published way has PyTorch's defaults: on CUDA, float32 convolutions in TF32, which ours are not.
"""
import argparse
import json
import math
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import published_style as published
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attacks
from data import Augmentation, Images
from device import compile_network, keep_freed_memory, memory_format
from distributed import World
from engine import Progress, Trainer, closing_attack, float32_logits, train_epoch
from preactresnet import PreActResNet18
from precision import Precision
from run import describe_machine
from utils import whole_file

EPSILON, PGD_ALPHA = 8 / 255, 2 / 255
NORMALIZATION = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616))

# Attack by name: ours, the published way's.
ATTACKS = {
    "fgsm": (partial(attacks.fgsm, epsilon=EPSILON, alpha=2 * EPSILON),
             partial(published.fgsm, epsilon=EPSILON, alpha=2 * EPSILON)),
    "zerograd": (partial(attacks.zerograd, epsilon=EPSILON, alpha=2 * EPSILON, q=0.35),
                 partial(published.zerograd, epsilon=EPSILON, alpha=2 * EPSILON, q=0.35)),
    "multigrad": (partial(attacks.multigrad, epsilon=EPSILON, alpha=2 * EPSILON),
                  partial(published.multigrad, epsilon=EPSILON, alpha=2 * EPSILON, samples=3, parallel=False)),
    "multigrad parallel": (
        partial(attacks.multigrad, epsilon=EPSILON, alpha=2 * EPSILON, parallel=True),
        partial(published.multigrad, epsilon=EPSILON, alpha=2 * EPSILON, samples=3, parallel=True)),
    "pgd-10": (partial(attacks.pgd, epsilon=EPSILON, alpha=PGD_ALPHA, steps=10),
               partial(published.pgd, epsilon=EPSILON, alpha=PGD_ALPHA, steps=10)),
}


def seconds(work, device) -> float:
    """Wall-clock time of `work()`, the device's part included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def as_alone(ours: bool, device) -> None:
    """Have what holds for the whole process as in a process of that side alone."""
    if device.type == "cpu":
        keep_freed_memory(ours)
    else:
        torch.backends.cudnn.allow_tf32 = not ours


def turn(work, device, ours: bool) -> float:
    """Seconds of `work()`, as in a process of that side alone; on a CPU, once its memory is warm."""
    as_alone(ours, device)
    if device.type == "cpu":
        work()
    return seconds(work, device)


def side_by_side(ours, theirs, device, dtype: torch.dtype, rounds: int) -> list[dict[str, float]]:
    """In turns, after a round that is not counted: seconds of each way, and a matrix product's operations a second."""
    return [{"ours": turn(ours, device, True), "published": turn(theirs, device, False),
             "matrix_product": peak_flops(dtype, device)} for _ in range(rounds + 1)][1:]


def peak_flops(dtype: torch.dtype, device) -> float:
    """The best of a few large matrix products, in operations a second."""
    n = 8192 if device.type == "cuda" else 3072
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(4))


def peak_memory(device) -> int:
    """The most bytes that were in use at once so far: on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def save(result: dict, path: str | None) -> None:
    """Write what has been measured so far, where that is asked for."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--amp", action="store_true", help="our side in bfloat16")
    p.add_argument("--compile", action="store_true", help="our side under torch.compile")
    p.add_argument("--compile-mode", default="default", help="its mode; reduce-overhead uses CUDA graphs")
    p.add_argument("--base-width", type=int, default=64)
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=0, help="steps a round (default: 20 on CUDA, 1 on CPU)")
    p.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=list(ATTACKS))
    p.add_argument("--eval-iters", type=int, default=50)
    p.add_argument("--eval-restarts", type=int, default=10)
    p.add_argument("--eval-images", type=int, default=1024, help="0: no evaluation")
    p.add_argument("--eval-rounds", type=int, default=1)
    p.add_argument("--json", help="also write the figures here")
    args = p.parse_args()

    torch.manual_seed(0)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    torch.backends.cudnn.benchmark = True
    precision = Precision(args.amp, "bfloat16", "native", device)
    b, steps = args.batch_size, args.steps or (20 if device.type == "cuda" else 1)
    augmentation = Augmentation(4, "reflect", True)
    pixels, labels = torch.randint(256, (b * steps, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (b * steps,))
    their_loader = published.loader(pixels.numpy(), labels.numpy(), b, device)

    ours, theirs = (PreActResNet18(base_width=args.base_width, **NORMALIZATION).to(device).train() for _ in range(2))
    images = Images(pixels, labels).to(device, memory_format(ours, device))
    ours = ours.to(memory_format=images.memory_format)
    if args.compile:
        compile_network(ours, args.compile_mode)
    our_optimizer = torch.optim.SGD(ours.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    their_optimizer = torch.optim.SGD(theirs.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    result = {**describe_machine(device, World()), "dtype": str(precision.dtype),
              "compile": args.compile and args.compile_mode, "base_width": args.base_width, "batch_size": b,
              "steps_a_round": steps, "step": {}}
    print(f"{result['device']}, {result['threads']} threads, torch {torch.__version__}, {precision.dtype}, "
          f"width {args.base_width}, batch {b}; medians of {args.rounds} rounds of {steps} steps\n")
    print(f"{'step with data':20s} {'images/s':>9s} {'published':>9s} {'ratio':>6s} {'lowest':>7s} {'highest':>7s} "
          f"{'GFLOP/image':>11s} {'of peak':>8s} {'50,000 images, s':>17s}")
    for attack in args.attacks:
        mine, published_attack = ATTACKS[attack]
        trainer = Trainer(ours, ours, our_optimizer, mine, lambda t: 0.01, images, augmentation, b, 0, precision,
                          World())

        def our_steps(trainer=trainer):
            train_epoch(trainer, Progress())

        def their_steps(attack=published_attack):
            for x, y in their_loader:
                published.train_step(theirs, their_optimizer, attack, x.to(device).float(), y.to(device).long())

        # The compiler gives up for good on what it first meets inside of a mode.
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            our_steps()
        work = counter.get_total_flops() / (b * steps)
        rounds = side_by_side(our_steps, their_steps, device, precision.dtype, args.rounds)
        mine_s, theirs_s = (statistics.median(r[side] for r in rounds) for side in ("ours", "published"))
        ratios = [r["published"] / r["ours"] for r in rounds]
        share = statistics.median(work * b * steps / r["ours"] / r["matrix_product"] for r in rounds)
        speed, published_speed = b * steps / mine_s, b * steps / theirs_s
        result["step"][attack] = {"images_per_second": speed, "published": published_speed,
                                  "ratio": statistics.median(ratios), "gflop_per_image": work / 1e9,
                                  "share_of_peak": share, "rounds": rounds}
        print(f"{attack:20s} {speed:9.1f} {published_speed:9.1f} {statistics.median(ratios):6.2f} {min(ratios):7.2f} "
              f"{max(ratios):7.2f} {work / 1e9:11.2f} {share:8.1%} {50_000 / speed:17.1f}", flush=True)
        save(result, args.json)
        if attack == "zerograd":
            step_s = mine_s / steps

    if "zerograd" in args.attacks:
        index = torch.randperm(len(images))[:b].to(device)
        drawn = {key: value.to(device) for key, value in augmentation.draw(b).items()}
        data_s = statistics.median(seconds(lambda: images.batch(index, augmentation, drawn), device) for _ in range(9))
        result["data_share_of_zerograd_step"] = data_s / step_s
        print(f"\ndata and augmentation: {1e3 * data_s:.2f} ms a batch, {data_s / step_s:.2%} of a ZeroGrad step")

    if args.eval_images:
        evaluation(args, ours, theirs, device, precision, result)
    result["peak_memory_bytes"] = peak_memory(device)
    print(f"\npeak memory, both sides: {result['peak_memory_bytes'] / 2**30:.2f} GiB")
    save(result, args.json)


def evaluation(args, ours, theirs, device, precision, result) -> None:
    """PGD-10 and the closing attack on an untrained network, at an epsilon at which about half of its images break.

    Three ways: ours, which drops images as they break and fills their places; ours on whole batches, judged at the end
    of a restart; and the published one.
    """
    ours.load_state_dict(theirs.eval().state_dict())
    ours.eval()
    if args.compile:  # as a run does
        torch.compiler.reset()
        ours.compile()
    torch.backends.cudnn.benchmark = False  # likewise
    images = Images(torch.randint(256, (args.eval_images, 32, 32, 3), dtype=torch.uint8),
                    torch.zeros(args.eval_images, dtype=torch.long)).to(device, memory_format(ours, device))
    x, _ = images.batch(slice(None))
    with torch.no_grad():
        images.labels = torch.cat([theirs(part).argmax(dim=1) for part in x.split(args.batch_size)])
    low, high = 1e-6, 0.1
    for _ in range(8):
        epsilon = math.sqrt(low * high)
        robust = closing_attack(ours, images[:128], epsilon, epsilon / 4, 10, 3, args.batch_size, 0, precision)
        low, high = (epsilon, high) if robust["robust_acc"] > 0.5 else (low, epsilon)
    print(f"\n{'evaluation':20s} {'seconds':>9s} {'whole batches':>13s} {'published':>9s} {'ratio':>6s}  broken images")
    for iters, restarts in dict.fromkeys(((10, 1), (args.eval_iters, args.eval_restarts))):
        attack = dict(epsilon=epsilon, alpha=epsilon / 4, steps=iters, restarts=restarts)
        ways = {
            "ours": lambda attack=attack: closing_attack(
                ours, images, **attack, batch_size=args.batch_size, seed=0, precision=precision)["robust_acc"],
            "whole batches": lambda attack=attack: whole_batches(ours, images, attack, args.batch_size, precision),
            "published": lambda attack=attack: published.evaluate(
                theirs, x.contiguous(), images.labels, **attack, batch_size=args.batch_size)}
        robust, taken = {}, {name: [] for name in ways}

        def timed(name, way, robust=robust):
            robust[name] = way()

        for _ in range(args.eval_rounds):
            for name, way in ways.items():
                as_alone(name != "published", device)
                if device.type == "cuda" and not taken[name]:
                    timed(name, way)  # choose kernels and compile
                taken[name].append(seconds(partial(timed, name, way), device))
        ratio = statistics.median(b / a for a, b in zip(taken["ours"], taken["published"]))
        medians = {name: statistics.median(values) for name, values in taken.items()}
        name = f"pgd-{iters}-{restarts}"
        result[name] = {"seconds": medians, "ratio": ratio, "images": args.eval_images, "robust": robust}
        save(result, args.json)
        print(f"{name:20s} {medians['ours']:9.1f} {medians['whole batches']:13.1f} {medians['published']:9.1f} "
              f"{ratio:6.2f}  {1 - robust['ours']:.0%} of {args.eval_images}", flush=True)


def whole_batches(model, images: Images, attack: dict, batch_size: int, precision) -> float:
    """Robust accuracy by our attack on whole batches, the broken images among them."""
    right = 0
    for first in range(0, len(images), batch_size):
        x, y = images.batch(slice(first, first + batch_size))
        with precision.autocast():
            delta = attacks.pgd(model, x, y, **attack, early_stop=True)
        right += (float32_logits(model, x + delta, precision).argmax(dim=1) == y).sum().item()
    return right / len(images)


if __name__ == "__main__":
    main()
