"""Train a robust classifier on Tiny-ImageNet (200 classes, 64x64 pixels). For example:

    python train_tiny.py --method=n-fgsm
    python train_tiny.py --method=pgi --recipe=fastat

The labelled validation images are the test set.
"""
from singlestep.options import TINY, parse

if __name__ == "__main__":
    args = parse(TINY, __doc__)
    from singlestep.train import main  # after the command line, which answers without PyTorch

    main(TINY, args)
