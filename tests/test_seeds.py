"""Random streams: what is drawn for one purpose is never what is drawn for another."""
import torch
from helpers import DATASETS

from singlestep import options, robustness, train
from singlestep.run.distributed import World


def test_initial_weights_and_the_first_epochs_order_come_of_different_streams(monkeypatch):
    """Also at seed 0, where NumPy cannot tell a short key from one that ends in zeros."""
    keys = []
    seed_everything = train.seed_everything
    monkeypatch.setattr(train, "seed_everything", lambda *key: (keys.append(key), seed_everything(*key)))
    args = options.parse(DATASETS["train_cifar.py"], argv=["--base-width=4", "--seed=0", "--device=cpu"])
    train.build(DATASETS["train_cifar.py"], args, torch.device("cpu"), World())
    assert keys == [(train.WEIGHTS, 0)]
    purposes = (train.ORDER, train.STEP, train.WATCH, train.WEIGHTS, robustness.STARTS)
    assert len(set(purposes)) == 5
    padded = [(purpose, 0, 0, 0) for purpose in purposes]
    drawn = []
    for key in padded:
        seed_everything(*key)
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 5
