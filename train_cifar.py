"""Train a robust classifier on CIFAR-10. The paper's commands:

    python train_cifar.py --epochs=30 --lr-schedule=cyclic --lr-max=0.2 --attack=zerograd --zero-qval=0.35
    python train_cifar.py --epochs=30 --lr-schedule=cyclic --lr-max=0.2 --attack=multigrad --multi-samps=3

A first try, without a data set; it takes a few minutes on a laptop's CPU:

    python train_cifar.py --dummy --epochs=3 --lr-schedule=cyclic --lr-max=0.2 --attack=zerograd --base-width=16 \\
        --final-iters=10 --final-restarts=1
"""
from options import DataSet, parse

DATASET = DataSet(
    name="CIFAR-10",
    source="CIFAR10",
    classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2471, 0.2435, 0.2616),
    augmentation=dict(padding=4, pad_mode="reflect", flip=True),
    defaults=dict(data_dir="../cifar-data", fname="cifar_model", epochs=52, lr_schedule="onedrop", lr_max=0.1,
                  zero_qval=0.35),
)

if __name__ == "__main__":
    args = parse(DATASET, __doc__)
    from train import main  # after the command line, which answers without PyTorch

    main(DATASET, args)
