"""`train` on tiny checkpoints and data sets: every kind of task by every method, and what it leaves behind."""

import pytest

from linlora.training import train

KINDS = ("text", "image", "seq2seq", "causal", "zero-shot")
METHODS = ("lora", "lora-fa", "layer", "model")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_kind_by_every_method(settings, kind, method):
    run = train(settings(kind, method=method))
    assert set(run.metrics) >= {"validation", "test", "train_loss", "environment"}
    assert run.vector.norm() > 0
