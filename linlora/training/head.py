"""The head of a classifier, trained beside the adapter: read from a model, and put into one of another task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from linlora.layers.sharding import whole

HEAD_FILE = "head.safetensors"


def read_head(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the modules that train beside the adapter, by their names in the base model."""
    return {name: whole(parameter.detach()).cpu().clone() for name, parameter in _parameters(model)}


def set_head(model: nn.Module, head: Mapping[str, Tensor]) -> None:
    """Put a head into a model, plain or a PeftModel, in place. It may have another number of classes than its own.

    >>> from linlora.testing import tiny_model
    >>> model = tiny_model("bert", modules_to_save=["classifier"])
    >>> head = {name: weight[:2] for name, weight in read_head(model).items()}
    >>> set_head(model, head)
    >>> {name: tuple(weight.shape) for name, weight in read_head(model).items()}
    {'classifier.weight': (2, 32), 'classifier.bias': (2,)}
    """
    if isinstance(model, PeftModel):
        parameters = dict(_parameters(model))
    else:
        parameters = {name: p for name, p in model.named_parameters() if name in head}
    if parameters.keys() != head.keys():
        raise ValueError(
            f"the head holds {', '.join(sorted(head)) or 'nothing'}; that of the model {', '.join(sorted(parameters))}"
        )
    for name, parameter in parameters.items():
        parameter.data = head[name].to(parameter.device, parameter.dtype)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            base = path.removeprefix("base_model.model.")
            for name, parameter in module.modules_to_save[module.active_adapters[0]].named_parameters():
                yield f"{base}.{name}", parameter
