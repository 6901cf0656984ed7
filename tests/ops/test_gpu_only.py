"""What only a GPU can show: launches that repeat bit by bit, and CUDA graphs."""

import pytest
import torch
from linlora.bench import graphs
from linlora.bench.cases import Case
from linlora.bench.data import random_layer
from linlora.bench.job import switched
from linlora.bench.layers import linearized

from linlora.ops import backends

LAUNCHES = 1000

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if (obstacle := backends.unavailable(request.param, torch.device("cuda"))) is not None:
        pytest.skip(obstacle)
    return request.param


@pytest.mark.parametrize(("rows", "features"), [(16, 1024), (64, 1024), (300, 512), (4096, 1024)])
@pytest.mark.parametrize("op", ["linearized_lora_linear", "lora_linear"])
def test_a_thousand_launches_give_the_same_bits(backend, op, rows, features):
    case = Case("q", "repeated", rows, features, features, 16, "bfloat16", "pair", "forward", op)
    layer = linearized(data := random_layer(case, torch.device("cuda")))
    with switched(backend, grad=False):
        first = layer.forward(*data.inputs)
        for _ in range(LAUNCHES):
            again = layer.forward(*data.inputs)
            pairs = zip(first, again, strict=True) if isinstance(first, tuple) else ((first, again),)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("rows", "features"), graphs.SHAPES)
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_captured_training_step_replays_as_it_was(backend, rows, features, scope):
    assert graphs.check(backend, rows, features, scope) is None


def test_a_captured_training_step_draws_new_dropout_masks():
    """A graph that held on to the mask of its capture would repeat it; replays draw as steps do."""
    losses = graphs.train(64, 64, "layer", 0.5, torch.device("cuda"), captured=True)["loss"]
    assert losses.unique().numel() == losses.numel()
