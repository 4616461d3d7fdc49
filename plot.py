"""Compare runs: print a table of their accuracies, and plot curves over epochs.

    python plot.py runs/zerograd_q*                        # the table
    python plot.py runs/zerograd --out=zerograd.pdf        # one run: accuracy on clean images, under FGSM, under PGD
    python plot.py runs/zerograd_q* --out=zerograd.png     # several: PGD accuracy; a .png, .pdf or .svg file
    python plot.py runs/* --y=test_robust_acc,test_acc --out=curves.pdf
    python plot.py runs/* --latex=table.tex --csv=table.csv

Runs are named by the flags in which they differ. Runs that differ only in the seed, or in flags that change no curve
(such as --final-iters), are averaged; in the figure, a band
shows their minimum and maximum. --by-seed shows these runs separately. Epochs count from 1 here, from 0 in the files.
"""
from singlestep.figures import main

if __name__ == "__main__":
    main(__doc__)
