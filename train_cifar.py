"""Train a robust classifier on CIFAR-10. Commands of the ZeroGrad paper:

    python train_cifar.py --epochs=30 --lr-schedule=cyclic --lr-max=0.2 --attack=zerograd --zero-qval=0.35
    python train_cifar.py --epochs=30 --lr-schedule=cyclic --lr-max=0.2 --attack=multigrad --multi-samps=3

Without these flags, it trains as the authors' scripts do by default: 52 epochs, onedrop.

Another method, with the paper's schedule and two seeds:

    python train_cifar.py --method=n-fgsm --recipe=paper --seed=0 --fname=runs/n-fgsm_0
    python train_cifar.py --method=n-fgsm --recipe=paper --seed=1 --fname=runs/n-fgsm_1

Quick test without a data set (a few minutes on a laptop's CPU):

    python train_cifar.py --dummy --epochs=3 --lr-schedule=cyclic --lr-max=0.2 --attack=zerograd --base-width=16 \\
        --final-iters=10 --final-restarts=1
"""
from singlestep.options import CIFAR10, parse

if __name__ == "__main__":
    args = parse(CIFAR10, __doc__)
    from singlestep.train import main  # after the command line, which answers without PyTorch

    main(CIFAR10, args)
