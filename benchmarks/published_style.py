"""Baseline of the benchmark: training and evaluation as in the authors' scripts.

Network, batch and attacks are the same as in this package. The baseline keeps what makes the authors' scripts slow:

* float32 in PyTorch's default layout;
* backward passes through every parameter in an attack;
* an additional forward pass after FGSM and PGD, which updates BatchNorm's running statistics again;
* images augmented one by one in float64, by two processes in parallel to the training step;
* two reads of a number from the device in every training step;
* an evaluation that continues to attack misclassified images, and uses only the perturbation with the highest loss.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def clamp(delta: Tensor, x: Tensor) -> Tensor:
    return torch.max(torch.min(delta, 1 - x), -x)


def uniform(x: Tensor, epsilon: float) -> Tensor:
    delta = torch.zeros_like(x)
    delta.uniform_(-epsilon, epsilon)
    delta = clamp(delta, x)
    delta.requires_grad = True
    return delta


def full_gradient(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input gradient and the logits, by a backward pass through all parameters."""
    output = model(x + delta)
    F.cross_entropy(output, y).backward()
    return delta.grad.detach(), output


def fgsm(model, x, y, epsilon, alpha):
    delta = uniform(x, epsilon)
    grad, _ = full_gradient(model, x, y, delta)
    with torch.no_grad():
        delta = clamp(torch.clamp(delta + alpha * grad.sign(), -epsilon, epsilon), x)
        F.cross_entropy(model(x + delta), y, reduction="none")  # the authors compare restarts even if there is one
    return delta.detach()


def zerograd(model, x, y, epsilon, alpha, q):
    delta = uniform(x, epsilon)
    grad, _ = full_gradient(model, x, y, delta)
    threshold = torch.quantile(grad.abs().view(len(x), -1), q, dim=1)
    grad[grad.abs() < threshold.view(-1, 1, 1, 1)] = 0
    return clamp(torch.clamp(delta + alpha * grad.sign(), -epsilon, epsilon), x).detach()


def multigrad(model, x, y, epsilon, alpha, samples, parallel):
    if parallel:
        xs, ys = torch.cat([x] * samples), torch.cat([y] * samples)
        grads = full_gradient(model, xs, ys, uniform(xs, epsilon))[0].split(len(x))
    else:
        grads = [full_gradient(model, x, y, uniform(x, epsilon))[0].clone() for _ in range(samples)]
    votes = sum(grad.sign() for grad in grads)
    votes = torch.where(votes.abs() < samples, torch.zeros_like(votes), votes)
    return clamp(torch.clamp(alpha * votes.sign(), -epsilon, epsilon), x).detach()


def pgd(model, x, y, epsilon, alpha, steps, restarts=1, early_stop=False):
    best_loss, best_delta = torch.zeros(len(y), device=x.device), torch.zeros_like(x)
    for _ in range(restarts):
        delta = uniform(x, epsilon)
        for _ in range(steps):
            grad, output = full_gradient(model, x, y, delta)
            moving = torch.where(output.max(1)[1] == y)[0] if early_stop else slice(None)
            if early_stop and len(moving) == 0:
                break
            moved = torch.clamp(delta[moving] + alpha * grad[moving].sign(), -epsilon, epsilon)
            delta.data[moving] = clamp(moved, x[moving]).detach()
            delta.grad.zero_()
        with torch.no_grad():
            loss = F.cross_entropy(model(x + delta), y, reduction="none")
        best_delta[loss >= best_loss] = delta.detach()[loss >= best_loss]
        best_loss = torch.max(best_loss, loss)
    return best_delta


def train_step(model, optimizer, attack, x, y):
    delta = attack(model, x, y)
    output = model(torch.clamp(x + delta, 0, 1))
    loss = F.cross_entropy(output, y)
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    optimizer.step()
    return loss.item(), (output.max(1)[1] == y).sum().item()


class TrainingSet(Dataset):
    """Images uint8 (N, 32, 32, 3), padded, as float64; cropped and flipped one at a time."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray):
        padded = np.pad(pixels, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
        self.images, self.labels = padded.transpose(0, 3, 1, 2) / 255.0, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        top, left = np.random.randint(9, size=2)
        crop = self.images[i, :, top:top + 32, left:left + 32]
        return crop[:, :, ::-1].copy() if np.random.rand() < 0.5 else crop, self.labels[i]


def loader(pixels: np.ndarray, labels: np.ndarray, batch_size: int, device: torch.device) -> DataLoader:
    return DataLoader(TrainingSet(pixels, labels), batch_size, shuffle=True, num_workers=2,
                      pin_memory=device.type == "cuda", persistent_workers=True)


def evaluate(model, x, y, epsilon, alpha, steps, restarts, batch_size) -> float:
    """Return the PGD accuracy, from 0 to 1; PGD stops early."""
    right = 0
    for xs, ys in zip(x.split(batch_size), y.split(batch_size)):
        delta = pgd(model, xs, ys, epsilon, alpha, steps, restarts, early_stop=True)
        with torch.no_grad():
            right += (model(torch.clamp(xs + delta, 0, 1)).max(1)[1] == ys).sum().item()
    return right / len(y)
