"""The environment of a result: plain JSON values, and the commit of this checkout or the one that is given."""

import json

import torch

from linlora.storage import environment as module
from linlora.storage.environment import PACKAGES, commit, environment


def test_it_is_json_and_names_machine_and_versions():
    described = environment()
    assert json.loads(json.dumps(described)) == described
    assert described["torch"] == torch.__version__
    assert {"date", "commit", "python", "cpu", "cores", "threads", *PACKAGES} <= set(described)
    assert "gpu" not in described


def test_the_commit_that_is_given_wins(monkeypatch):
    monkeypatch.setenv("LINLORA_COMMIT", "c0ffee")
    assert commit() == "c0ffee"


def test_a_repository_around_an_installed_package_is_not_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    assert commit() == "unknown"
