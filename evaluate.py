"""Evaluate networks on clean images, and under FGSM, PGD, CW and AutoAttack.

    python evaluate.py runs/zerograd --attacks=clean,pgd-50-10,autoattack --samples=1000
    python evaluate.py published.pt --data-set=cifar10 --model=WideResNet --epsilons=2,4,8
    python evaluate.py --network=my_module:my_function --weights=my_weights.pt --data-set=cifar10
    python evaluate.py runs/a runs/b runs/c --attacks=clean,autoattack --samples=200 --latex=table.tex

The folder of a run records its network, data set and epsilon; for a third-party checkpoint, give them as flags.
Results are printed, and saved in evaluation.json: in the run's folder, next to the file, or in --out. Attacks whose
results are saved are not run again; --again runs them. With several networks, a comparison table follows.
"""
from singlestep.options import parse_evaluation

if __name__ == "__main__":
    args = parse_evaluation(__doc__)
    from singlestep.evaluation import main  # after the command line, which answers without PyTorch

    main(args)
