"""Compare runs: a table of how they ended, and their curves.

    python plot.py runs/zerograd_q*                        # the table
    python plot.py runs/zerograd --out=zerograd.pdf        # one run: clean accuracy, and under FGSM and PGD
    python plot.py runs/zerograd_q* --out=zerograd.png     # the figure as well: .png, .pdf or .svg
    python plot.py runs/* --y=test_robust_acc,test_acc --out=curves.pdf
    python plot.py runs/* --latex=table.tex --csv=table.csv

A run is named by the flags in which it differs from the others. Runs that differ in the seed alone become one: the
mean, and from the lowest to the highest as a band; --by-seed keeps them apart. Epochs count from 1 here, from 0 in a
run's files.
"""
from singlestep.figures import main

if __name__ == "__main__":
    main(__doc__)
