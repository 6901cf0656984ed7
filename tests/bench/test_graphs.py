"""The training step that CUDA graphs capture."""

import pytest
import torch
from linlora.bench import graphs


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_training_step_that_graphs_capture_trains(scope: str) -> None:
    trained, again = (graphs.train(8, 16, scope, 0.0, torch.device("cpu"), captured=False) for _ in range(2))
    assert trained["loss"].isfinite().all()
    assert trained["parameter 0"].any()
    assert all(torch.equal(trained[name], again[name]) for name in trained)
