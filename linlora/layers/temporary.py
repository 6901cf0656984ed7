"""Changes of a model that last for a block: eval mode, other values of parameters, gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode meanwhile, module by module what it was afterwards.

    >>> from torch.nn import Dropout
    >>> model = Dropout()
    >>> with evaluating(model):
    ...     print(model.training)
    False
    >>> model.training
    True
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def displaced(parameters: Mapping[str, nn.Parameter], deltas: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the model be at φ0 + δ; the parameters are themselves again afterwards."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = deltas[name].to(parameter.device, parameter.dtype)
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


@contextmanager
def trainable(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let every parameter ask for its gradient, also those of an adapter that does not train."""
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
