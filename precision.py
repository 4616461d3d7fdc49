"""Where float32 gives way: automatic mixed precision, by PyTorch (`native`) or by NVIDIA's apex, and TF32."""
import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from utils import UsageError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """The precision of a run's attacks and training steps, and the float32 in which accuracy is judged."""

    def __init__(self, amp: bool, dtype: str, implementation: str, device: torch.device, tf32: bool = False):
        self.device, self.tf32 = device, tf32
        self.dtype = DTYPES[dtype] if amp else torch.float32
        self.apex = _apex() if amp and implementation == "apex" else None
        if self.apex and (self.dtype is not torch.float16 or device.type != "cuda"):
            raise UsageError("--amp-impl apex needs --amp-dtype float16 and a CUDA --device; or use --amp-impl native")
        scaled = self.dtype is torch.float16 and not self.apex
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        allow_tf32(tf32)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.apex:
            self.apex.initialize(model, optimizer, opt_level="O1", verbosity=0)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Forward passes in here use the run's precision."""
        native = self.dtype is not torch.float32 and not self.apex
        return torch.autocast(self.device.type, self.dtype, enabled=native)

    @contextlib.contextmanager
    def float32(self) -> Iterator[None]:
        """Forward passes in here are in float32, also inside `autocast()`."""
        with self.apex.disable_casts() if self.apex else torch.autocast(self.device.type, enabled=False):
            allow_tf32(False)
            try:
                yield
            finally:
                allow_tf32(self.tf32)

    @property
    def is_float32(self) -> bool:
        return self.dtype is torch.float32 and not self.tf32

    def backward_and_step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """One step of the optimizer down `loss`. Returns whether loss and gradient were finite, as a tensor.

        With float16 the loss is scaled; a step whose scaled gradient overflows is then skipped and no fault, and so
        apex, which scales too, is asked about the loss only.
        """
        optimizer.zero_grad(set_to_none=True)
        if self.apex:
            with self.apex.scale_loss(loss, optimizer) as scaled_loss:
                scaled_loss.backward()
            optimizer.step()
            return loss.detach().isfinite()
        self.scaler.scale(loss).backward()
        finite = loss.detach().isfinite()
        if not self.scaler.is_enabled():
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            finite &= torch.nn.utils.get_total_norm(gradients).isfinite()
        self.scaler.step(optimizer)
        self.scaler.update()
        return finite

    def clear_cast_cache(self) -> None:
        """For when the weights were replaced: apex keeps casts of the old ones until the next training step."""
        if self.apex:
            self.apex._amp_state.handle._clear_cache()

    def state_dict(self) -> dict:
        return self.apex.state_dict() if self.apex else self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.apex:
            self.apex.load_state_dict(state)
        elif state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


def allow_tf32(allowed: bool) -> None:
    """Whether CUDA may round the factors of float32 products to TF32's 10 bits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def prepare_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Start SGD's momentum at 0, as it is meant to.

    PyTorch makes the buffers at the first step, and where float16's scaler has the fused kernel skip that one, they
    stay uninitialized.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _apex():
    try:
        from apex import amp
    except ImportError:
        raise UsageError("--amp-impl apex needs an NVIDIA apex from before 2025-05-08, which still has apex.amp; "
                         "here there is none: use --amp-impl native") from None
    return amp
