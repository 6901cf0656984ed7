"""Reads L-LoRA checkpoints as the library that followed arXiv 2310.04742 publishes them.

`linearized_adapter_model.safetensors` beside `adapter_config.json` is of modules that wrap a LoRA layer and keep a copy
of its parameters at the start. It holds those that train:

    {layer}.model.lora_A.default.weight      A            {layer}.params0_values.{i}      A0
    {layer}.model.lora_B.default.weight      B            {layer}.params0_values.{j}      B0        i < j

i and j count all parameters of the layer (weight, bias, A, B): they are 1, 2 or 2, 3. Each layer is linearized by
itself at (A0, B0): a vector of scope "layer". Where B0 = 0 the change of A has no effect and is left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from torch import Tensor

from linlora.formats import keys
from linlora.formats.adapter_config import read_config, scalings
from linlora.formats.stored import Stored
from linlora.storage.files import CorruptFileError
from linlora.storage.tensor_files import TensorFile
from linlora.vectors.points import point_hash
from linlora.vectors.task_vector import TaskVector

LINEARIZED_FILE = "linearized_adapter_model.safetensors"
_STARTS = re.compile(r"(?P<layer>.+)\.params0_values\.(?P<index>\d+)")


def open_l_lora(folder: Path) -> Stored:
    """The vector (A - A0, B - B0) at (A0, B0)."""
    config = read_config(folder)
    path = folder / LINEARIZED_FILE
    trained: dict[str, dict[str, str]] = defaultdict(dict)
    starts: dict[str, dict[int, str]] = defaultdict(dict)
    with TensorFile(path) as file:
        for key in file.entries:
            start, factor = _STARTS.fullmatch(key), keys.factor(key)
            if start is not None:
                starts[keys.in_base_model(start["layer"])][int(start["index"])] = key
            elif factor is not None and factor.layer.endswith(".model"):
                trained[factor.layer.removesuffix(".model")][factor.kind] = key
            else:
                raise CorruptFileError(f"{path}: '{key}' is neither a trained factor nor one of a starting point")
        deltas: dict[str, Tensor] = {}
        point: dict[str, Tensor] = {}
        for layer in sorted(trained.keys() | starts.keys()):
            if len(trained[layer]) != 2 or len(starts[layer]) != 2:
                raise CorruptFileError(
                    f"{path}: layer '{layer}' has {len(trained[layer])} trained factors and {len(starts[layer])} of "
                    "its starting point; A, B, A0 and B0 are expected"
                )
            A, B = (file.read(trained[layer][kind]) for kind in "AB")
            A0, B0 = (file.read(key) for _, key in sorted(starts[layer].items()))
            if A.shape != A0.shape or B.shape != B0.shape or A.dim() != 2 or A.shape[0] != B.shape[1]:
                shapes = ", ".join(str(tuple(factor.shape)) for factor in (A, B, A0, B0))
                raise CorruptFileError(f"{path}: layer '{layer}': the shapes of A, B, A0, B0 do not fit: {shapes}")
            point[f"{layer}.A0"] = A0
            deltas[f"{layer}.dB"] = B - B0
            if B0.any():
                point[f"{layer}.B0"] = B0
                deltas[f"{layer}.dA"] = A - A0
    base_model = config.get("base_model_name_or_path") or None
    vector = TaskVector(deltas, point, point_hash(point), scalings(deltas, config, folder), "layer", base_model)
    return Stored(folder, "L-LoRA checkpoint", vector, {}, config)
