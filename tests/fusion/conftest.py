import pytest
import torch

import linlora
from linlora import TaskVector
from linlora.testing import randomize, tiny_model


def displaced(seed, scope):
    """A linearized model whose adapter is random."""
    model = tiny_model("bert", trained=True)
    linlora.linearize(model, scope=scope)
    randomize(model, seed, ("lora_dA", "lora_dB"))
    return model


@pytest.fixture(scope="session", params=["layer", "model"])
def scope(request):
    return request.param


@pytest.fixture(scope="session")
def vectors(scope):
    """Three vectors of one point."""
    return [TaskVector.from_model(displaced(seed, scope)) for seed in (1, 2, 3)]


@pytest.fixture(scope="session")
def made():
    """Vectors made by hand: one layer, whose dB holds the numbers."""

    def make(*rows, dtype=torch.float32):
        deltas = [{"q.dB": torch.tensor(row, dtype=dtype)} for row in rows]
        return [TaskVector(delta, None, "", {"q": 1.0}, "layer") for delta in deltas]

    return make


@pytest.fixture(scope="session")
def flat():
    """All values of a vector, in the order of the names."""
    return lambda vector: torch.cat([vector.deltas[name].flatten().double() for name in sorted(vector.deltas)])


@pytest.fixture
def at():
    """A model at the vectors' point, by scope."""
    return lambda scope: displaced(0, scope)


@pytest.fixture
def weights_in():
    """The weight of every vector in a fused one, in every layer, by least squares on values or on ΔW."""

    def values(vector, layer):
        if vector.scope == "weight":
            absent = layer not in vector.scalings
            update = None if absent else vector.update(layer)
            return None if absent else (update.B.double() @ update.A.double()).flatten()
        names = sorted(name for name in vector.deltas if name.rpartition(".")[0] == layer)
        return torch.cat([vector.deltas[name].flatten().double() for name in names])

    def weights(fused, vectors):
        found = {}
        for layer in fused.scalings:
            target, columns = values(fused, layer), [values(vector, layer) for vector in vectors]
            columns = torch.stack([torch.zeros_like(target) if c is None else c for c in columns], 1)
            found[layer] = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution.flatten()
        return found

    return weights
