"""Train a robust classifier on CIFAR-100. The paper's commands:

    python train_cifar100.py --epochs=30 --lr-schedule=cyclic --lr-max=0.2 --attack=zerograd --zero-qval=0.45
    python train_cifar100.py --epochs=30 --lr-schedule=cyclic --lr-max=0.2 --attack=multigrad --multi-samps=3
"""
from options import DataSet, parse

DATASET = DataSet(
    name="CIFAR-100",
    source="CIFAR100",
    classes=100,
    mean=(0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    std=(0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
    augmentation=dict(padding=4, pad_mode="zero", flip=True, degrees=15),
    defaults=dict(data_dir="../cifar100-data", fname="cifar100_model", epochs=52, lr_schedule="onedrop", lr_max=0.1,
                  zero_qval=0.45),
)

if __name__ == "__main__":
    args = parse(DATASET, __doc__)
    from train import main  # after the command line, which answers without PyTorch

    main(DATASET, args)
