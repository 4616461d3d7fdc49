"""Export a network: a safetensors file with a model card, or a folder for RobustBench.

    python export.py runs/zerograd --to=zerograd.safetensors
    python export.py runs/zerograd --which=best --half --to=small.safetensors
    python export.py runs/zerograd --to=robustbench/ --name=Author2026Title

The file's metadata has all that is needed to build the network and to trust it; `load_run` and evaluate.py read it.
The accuracies in it, and in the cards, are those that the run and evaluate.py measured: evaluate first.
"""
from singlestep.options import parse_export

if __name__ == "__main__":
    args = parse_export(__doc__)
    from singlestep.export import main  # after the command line, which answers without PyTorch

    main(args)
