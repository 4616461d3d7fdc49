"""Single-step adversarial training: ZeroGrad, MultiGrad and other methods.

The names below are imported when they are first used, so that `import singlestep` needs no PyTorch.
"""
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import load_run as load_run
    from .data import load_test as load_test
    from .robustness import PGD as PGD
    from .robustness import evaluate as evaluate
    from .run.device import seed_everything as seed_everything

WHERE = {"load_run": "checkpoints", "load_test": "data", "PGD": "robustness", "evaluate": "robustness",
         "seed_everything": "run.device"}
__all__ = list(WHERE)


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
