"""Export a network: a safetensors file with a model card, or a folder for RobustBench.

    python export.py runs/zerograd --to=zerograd.safetensors
    python export.py runs/zerograd --which=best --half --to=small.safetensors
    python export.py runs/zerograd --to=robustbench/ --name=Author2026Title

The metadata of the file holds the architecture, the normalization, the training flags and the measured accuracies;
`load_run` and evaluate.py read them. Run evaluate.py first: metadata and cards contain only the accuracies that the
training run and evaluate.py have measured.
"""
from singlestep.options import parse_export

if __name__ == "__main__":
    args = parse_export(__doc__)
    from singlestep.export import main  # after the command line, which answers without PyTorch

    main(args)
