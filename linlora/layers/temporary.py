"""Changes that last for a block: attributes, eval mode, other values of parameters, gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def attributes(of: Any, **values: Any) -> Iterator[None]:
    """Other values of attributes meanwhile.

    >>> from argparse import Namespace
    >>> rows = Namespace(lost=True)
    >>> with attributes(rows, lost=False):
    ...     print(rows.lost)
    False
    >>> rows.lost
    True
    """
    before = {name: getattr(of, name) for name in values}
    try:
        for name, value in values.items():
            setattr(of, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(of, name, value)


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
