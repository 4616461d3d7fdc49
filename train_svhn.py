"""Train a robust classifier on SVHN (cropped digits). The paper's commands:

    python train_svhn.py --epochs=15 --lr-schedule=cyclic --lr-max=0.01 --attack=zerograd --zero-qval=0.7 --full-test
    python train_svhn.py --epochs=15 --lr-schedule=cyclic --lr-max=0.01 --attack=multigrad --multi-samps=3 --full-test

The best checkpoint, on which the final evaluation is run, is chosen on training images.
"""
from options import DataSet, parse

DATASET = DataSet(
    name="SVHN",
    source="SVHN",
    classes=10,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    peak=lambda epochs: epochs * 2 // 5,
    validate=True,
    defaults=dict(data_dir="../svhn-data", fname="svhn_model", epochs=15, lr_schedule="cyclic", lr_max=0.01,
                  zero_qval=0.7, final_model="best"),
)

if __name__ == "__main__":
    args = parse(DATASET, __doc__)
    from train import main  # after the command line, which answers without PyTorch

    main(DATASET, args)
