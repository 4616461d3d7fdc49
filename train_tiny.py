"""Train a robust classifier on Tiny-ImageNet (200 classes, 64x64 pixels). For example:

    python train_tiny.py --method=n-fgsm
    python train_tiny.py --method=pgi --recipe=fastat

The test images are those of the published validation set, since the labels of the published test set are unpublished.
"""
from singlestep.options import TINY, parse

if __name__ == "__main__":
    args = parse(TINY, __doc__)
    from singlestep.train import main  # after the command line, which answers without PyTorch

    main(TINY, args)
