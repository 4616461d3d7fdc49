"""Evaluate networks on clean images, and under FGSM, PGD, CW and AutoAttack.

    python evaluate.py runs/zerograd --attacks=clean,pgd-50-10,autoattack --samples=1000
    python evaluate.py published.pt --data-set=cifar10 --model=WideResNet --epsilons=2,4,8
    python evaluate.py --network=my_module:my_function --weights=my_weights.pt --data-set=cifar10
    python evaluate.py runs/a runs/b runs/c --attacks=clean,autoattack --samples=200 --latex=table.tex

A run's folder says which network, data set and epsilon it has; for a published file, give them as flags. Each result
is printed as a row of a table, and kept in evaluation.json: in the run's folder, beside the file, or in --out. What
that file holds is not measured again. Several networks are compared in a last table.
"""
from singlestep.options import parse_evaluation

if __name__ == "__main__":
    args = parse_evaluation(__doc__)
    from singlestep.evaluation import main  # after the command line, which answers without PyTorch

    main(args)
