"""Train a robust classifier on SVHN (cropped digits). Commands of the ZeroGrad paper:

    python train_svhn.py --epochs=15 --lr-schedule=cyclic --lr-max=0.01 --attack=zerograd --zero-qval=0.7 --full-test
    python train_svhn.py --epochs=15 --lr-schedule=cyclic --lr-max=0.01 --attack=multigrad --multi-samps=3 --full-test

Another method, with two seeds:

    python train_svhn.py --method=n-fgsm --seed=0 --fname=runs/n-fgsm_0
    python train_svhn.py --method=n-fgsm --seed=1 --fname=runs/n-fgsm_1

The final evaluation uses the best checkpoint: by PGD accuracy on the first 2% of the training images or, with
--val-size=N, on the N images that are held out.
"""
from singlestep.options import SVHN, parse

if __name__ == "__main__":
    args = parse(SVHN, __doc__)
    from singlestep.train import main  # after the command line, which answers without PyTorch

    main(SVHN, args)
