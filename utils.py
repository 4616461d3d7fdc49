"""The main functions; the code is in singlestep/checkpoints.py, data.py, robustness.py and run/device.py."""
from singlestep.checkpoints import load_run
from singlestep.data import load_test
from singlestep.robustness import evaluate
from singlestep.run.device import seed_everything

__all__ = ["evaluate", "load_run", "load_test", "seed_everything"]
