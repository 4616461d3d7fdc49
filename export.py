"""Export a network: a safetensors file with a model card, or a folder for RobustBench.

    python export.py runs/zerograd --to=zerograd.safetensors
    python export.py runs/zerograd --which=best --half --to=small.safetensors
    python export.py runs/zerograd --to=robustbench/ --name=Author2026Title

The metadata of the file holds the architecture, the normalization and the training flags, so that load_run and
evaluate.py need only the file. It also holds the accuracies that the training run and evaluate.py have measured: run
evaluate.py first.
"""
from singlestep.options import parse_export

if __name__ == "__main__":
    args = parse_export(__doc__)
    from singlestep.export import main  # after the command line, which answers without PyTorch

    main(args)
