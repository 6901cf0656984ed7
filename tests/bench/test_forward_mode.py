"""The benchmark of `dual`: every provider is checked before it is timed, and a wrong one is refused."""

import pytest
import torch
from linlora.bench import forward_mode
from linlora.bench.measure import WallClock


def test_a_small_network_is_measured_by_every_provider():
    found = forward_mode.measure("tiny", torch.device("cpu"), seconds=0.0, clock=WallClock(torch.device("cpu")))
    assert [m.name for m in found] == list(forward_mode.PROVIDERS)
    assert found[0].ratio == 1.0
    assert all(m.peak - m.model > m.kept > 0 for m in found)
    kept = {m.name: m.kept for m in found}
    assert kept["dual"] < 1.15 * kept["plain"] < kept["torch.func.jvp"]
    assert "torch.func.jvp" in forward_mode.table(found)


def test_a_wrong_provider_is_refused(monkeypatch):
    def wrong(net, inputs, tangents):
        u, u_tangent = forward_mode.dual(net, inputs, tangents)
        return u, 1.1 * u_tangent.detach()

    monkeypatch.setitem(forward_mode.PROVIDERS, "dual", wrong)
    with pytest.raises(RuntimeError, match=r"dual: .* relative error"):
        forward_mode.measure("tiny", torch.device("cpu"), seconds=0.0)
