"""What a step does with a loss or a gradient that is NaN or infinite."""

from collections.abc import Sequence

import torch

STOP, SKIP = "stop", "skip"
IN_A_ROW = 10  # batches that may be left out one after the other: more come of the weights, not of a batch


class NonFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite."""


def is_finite(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """Scalar bool on the device: the loss and every gradient of the model are finite."""
    grads = [_local(p.grad) for p in model.parameters() if p.grad is not None]
    norms = torch._foreach_norm(grads) if grads else []
    return torch.stack([loss.detach().float(), *(norm.float().to(loss.device) for norm in norms)]).isfinite().all()


def culprits(parts: dict[str, torch.Tensor], model: torch.nn.Module) -> list[str]:
    """The losses, and the parameters by their gradients, that are not finite."""
    losses = [name for name, value in parts.items() if not bool(torch.isfinite(value).all())]
    gradients = [
        f"the gradient of {name}"
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(_local(parameter.grad).isfinite().all())
    ]
    return losses + gradients


def describe(step: int, what: Sequence[str], names: Sequence[str]) -> str:
    """One sentence: the step, what was not finite, and the rows of the batch."""
    rows = ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"step {step}: {', '.join(what) or 'another process has a loss or a gradient that'} is NaN or infinite" + (
        f", on a batch of {rows}" if rows else ""
    )


def _local(grad: torch.Tensor) -> torch.Tensor:
    return grad.to_local() if hasattr(grad, "to_local") else grad  # a sharded parameter's own part
