"""How fast each convolution of PreActResNet18 is, forward and back, as it is computed and as one matrix product.

    python benchmarks/convolutions.py                                  # float32, full width
    python benchmarks/convolutions.py --amp --base-width=16 --json=benchmarks/results/convolutions.json

The matrix product is of the layer's input, unfolded into a row for every pixel of the output (the time to unfold it is
counted), with the weights; or, for their gradient, with the output's gradient. Both ways take turns. Flags of
train_cifar.py that say what network, batch, precision and machine are ours hold here, too.
"""
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from speed import save, seconds

import options
import train
from machine import Precision, choose_device, describe, memory_format
from train_cifar import DATASET
from utils import one_line_errors

PASSES = ("forward", "input's gradient", "weight's gradient")


def unfolded(x: Tensor, k: int, stride: int) -> Tensor:
    """The k x k patches of x (B, C, H, W), best in channels_last, padded by k // 2: (pixels of the output, k k C)."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, k // 2, k // 2, k // 2, k // 2))
    return x.unfold(1, k, stride).unfold(2, k, stride).permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)


def ways(layer: nn.Conv2d, x: Tensor) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor] | None]]:
    """Of every pass, the layer's and the matrix product's, where there is one: a strided layer's input has none."""
    k, stride = layer.kernel_size[0], layer.stride[0]
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    weight = layer.weight.detach().to(x.dtype, memory_format=layout)
    output = F.conv2d(x, weight, None, stride, k // 2)
    gradient = torch.randn_like(output)

    def backward(mask: list[bool]) -> Tensor:
        both = torch.ops.aten.convolution_backward(gradient, x, weight, None, [stride] * 2, [k // 2] * 2, [1, 1],
                                                   False, [0, 0], 1, mask)
        return both[0] if mask[0] else both[1]

    def image(rows: Tensor) -> Tensor:
        return rows.view(len(x), *output.shape[2:], -1).permute(0, 3, 1, 2)

    rows = weight.permute(2, 3, 1, 0).flatten(0, 2)
    turned = weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2)
    filters = gradient.permute(0, 2, 3, 1).flatten(0, 2)
    return {
        "forward": (lambda: F.conv2d(x, weight, None, stride, k // 2), lambda: image(unfolded(x, k, stride) @ rows)),
        "input's gradient": (lambda: backward([True, False, False]),
                             (lambda: image(unfolded(gradient, k, 1) @ turned)) if stride == 1 else None),
        "weight's gradient": (lambda: backward([False, True, False]),
                              lambda: (filters.t() @ unfolded(x, k, stride)).unflatten(1, (k, k, -1)).permute(
                                  0, 3, 1, 2))}


def layers(model: nn.Module) -> dict[tuple, tuple[nn.Conv2d, int, int]]:
    """The different convolutions: one of each kind, the size of its input, and how many there are."""
    found: dict[tuple, tuple[nn.Conv2d, int, int]] = {}

    def add(layer: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        size = inputs[0].shape[-1]
        key = (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], size)
        found[key] = (layer, size, found[key][2] + 1 if key in found else 1)

    hooks = [layer.register_forward_hook(add) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return found


def measure(args) -> None:
    device = choose_device(args)
    precision = Precision(args, device)
    result = {**describe(device), "dtype": str(precision.dtype), "base_width": args.base_width,
              "batch_size": args.batch_size, "layers": []}
    print(f"{result['device']}, {result['threads']} threads, torch {torch.__version__}, {precision.dtype}, "
          f"width {args.base_width}, batch {args.batch_size}; the least of {args.rounds} turns\n")
    print(f"{'layer':30s} {'how many':>8s} {'pass':18s} {'ms':>8s} {'TFLOP/s':>8s} {'as a product, ms':>17s}")
    model = train.new_network(DATASET, args)
    layout = memory_format(model, device)
    for (inputs, outputs, k, stride, size), (layer, _, count) in layers(model).items():
        x = torch.randn(args.batch_size, inputs, size, size, device=device).to(precision.dtype, memory_format=layout)
        work = 2 * args.batch_size * (size // stride)**2 * inputs * outputs * k * k
        for name, both in ways(layer.to(device), x).items():
            taken = [min(times) for times in zip(*(
                [seconds(way, device) if way else float("inf") for way in both] for _ in range(args.rounds + 1)))]
            product = taken[1] if both[1] else None
            result["layers"].append({"inputs": inputs, "outputs": outputs, "kernel": k, "stride": stride, "size": size,
                                     "count": count, "pass": name, "seconds": taken[0], "as_product": product})
            title = f"{k}x{k}, {inputs} to {outputs}, {size}x{size}{f', stride {stride}' if stride > 1 else ''}"
            print(f"{title:30s} {count:8d} {name:18s} {1e3 * taken[0]:8.2f} {work / taken[0] / 1e12:8.2f} "
                  + (f"{1e3 * product:17.2f}" if product else ""), flush=True)
            save(result, args.json)
    print()
    for name in PASSES:
        found = [each for each in result["layers"] if each["pass"] == name]
        now = sum(each["count"] * each["seconds"] for each in found)
        best = sum(each["count"] * min(each["seconds"], each["as_product"] or each["seconds"]) for each in found)
        print(f"{name:18s} {1e3 * now:8.1f} ms a batch; with the faster way for each layer {1e3 * best:.1f}")


def main() -> None:
    p = options.Parser(__doc__)
    p.add_argument("--rounds", type=options.number(int, 1), default=5, help="turns of each way")
    p.add_argument("--json", type=options.path, help="also write the figures here")
    own, argv = p.parse_known_args()
    args = options.parse(DATASET, argv=["--lr-max=0.01", *argv])
    vars(args).update(vars(own))
    with one_line_errors():
        if args.json:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)  # or the figures would be lost
        measure(args)


if __name__ == "__main__":
    main()
