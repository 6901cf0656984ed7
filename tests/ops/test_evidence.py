"""The evidence in files: whole entries of this machine count, damaged and foreign ones do not, nothing is lost."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_gpu import MACHINE, entry

from linlora.ops import evidence
from linlora.ops.evidence import TABLE, Call, Entry

CALL = Call("lora_linear", (2048, 64, 4096), "bfloat16", 16)


def decided():
    found = evidence.decisive(CALL, None)
    return None if found is None else found.ranking


def the_file(gpu) -> Path:
    (file,) = gpu.cache.rglob("*.json")
    return file


def test_an_entry_is_kept_for_the_next_process(gpu):
    made = entry(CALL, triton=1.3, cuda="wrong")
    evidence.add([made])
    gpu.again()
    assert evidence.own_entries(None) == [made]
    assert decided() == ["triton"]
    assert the_file(gpu).parent.name == evidence.key(MACHINE)


def test_calls_that_are_decided_alike_share_a_file_and_the_newest_counts(gpu):
    evidence.add([entry(CALL, triton=1.3), entry(CALL._replace(size=(1500, 64, 4000)), triton=0.9)])
    gpu.again()
    assert decided() == []
    assert the_file(gpu).name == "lora_linear-2048x64x4096-r16-bfloat16.json"


@pytest.mark.parametrize("what", list(MACHINE))
def test_another_gpu_driver_version_or_source_is_a_miss(gpu, what):
    evidence.add([entry(CALL, machine=MACHINE | {what: "another"}, triton=1.3)])
    gpu.again()
    assert decided() is None
    file = the_file(gpu)  # moved into this machine's folder it is foreign all the same
    (gpu.cache / evidence.key(MACHINE)).mkdir()
    file.rename(gpu.cache / evidence.key(MACHINE) / file.name)
    gpu.again()
    assert decided() is None


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"call": 1}', lambda text: text[: len(text) // 2], lambda text: text.replace("100.0", "-1")],
)
def test_a_damaged_file_is_named_and_ignored(gpu, capsys, damage):
    evidence.add([entry(CALL, triton=1.3), entry(CALL._replace(op="linear"), triton=1.3)])
    file = next(gpu.cache.rglob("lora_linear*.json"))
    file.write_text(damage(file.read_text()) if callable(damage) else damage)
    gpu.again()
    assert decided() is None
    assert evidence.decisive(CALL._replace(op="linear"), None) is not None
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(file) in said
    assert "damaged and ignored" in said
    assert "`linlora tune`" in said


def test_a_cache_that_cannot_be_written_is_said_once_and_holds_for_the_process(gpu, capsys):
    gpu.cache.parent.mkdir()
    gpu.cache.write_text("a file where the folder would be")
    evidence.add([entry(CALL, triton=1.3), entry(CALL._replace(op="linear"), triton=1.3)])
    assert decided() == ["triton"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be written" in said


def test_the_evidence_of_this_machine_wins_over_the_packages(gpu):
    other = MACHINE | {"gpu": "NVIDIA H100", "driver": "older", "torch": "1", "triton": "1"}
    gpu.table.write_text(json.dumps([entry(CALL, machine=other, cuda=2.0).as_json()]))
    gpu.again()
    assert decided() == ["cuda"]
    evidence.add([entry(CALL._replace(size=(4096, 64, 4096)), triton=1.1)])
    assert decided() == ["triton"]


@pytest.mark.parametrize("what", ["architecture", "sources"])
def test_the_packages_evidence_is_of_an_architecture_and_of_these_sources(gpu, what):
    gpu.table.write_text(json.dumps([entry(CALL, machine=MACHINE | {what: "another"}, cuda=2.0).as_json()]))
    gpu.again()
    assert decided() is None


def test_writers_of_the_same_entry_leave_a_whole_one_at_any_moment(gpu):
    made = [entry(CALL, triton=speed) for speed in (1.5, 2.5)]
    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(lambda of=of: [evidence.add([of]) for _ in range(20)]) for of in made]
        while not all(writer.done() for writer in writers):
            assert all(json.loads(file.read_text()) for file in gpu.cache.rglob("*.json"))
    gpu.again()
    assert evidence.own_entries(None) in ([made[0]], [made[1]])


def test_times_are_over_torch_in_the_worst_case_and_over_peers_in_all():
    made = entry(CALL, triton=2.0)
    torch_, triton = made.candidates["torch"], replace(made.candidates["triton"], microseconds=(50.0, 25.0))
    torch_ = replace(torch_, microseconds=(100.0, 30.0))
    peers = {"F.linear": (40.0, 10.0), "PEFT": (100.0, None)}
    made = replace(made, cases=("a", "b"), candidates={"torch": torch_, "triton": triton}, peers=peers)
    assert made.speedup("triton") == pytest.approx(1.2)
    assert made.over("F.linear", "triton") == pytest.approx(1.5)
    assert made.over("PEFT", "triton") == pytest.approx(0.5)
    assert Entry.parse(json.loads(json.dumps(made.as_json()))) == made


def test_the_sources_are_hashed_where_they_decide(monkeypatch, tmp_path):
    before = evidence.sources()
    assert before == evidence.sources()
    for name in ("configs.py", "launch.py"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(evidence.kernels, "__file__", str(tmp_path / "__init__.py"))
    assert evidence.sources() != before


def test_the_package_holds_entries():
    assert all(isinstance(Entry.parse(entry), Entry) for entry in json.loads(TABLE.read_text()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_machine_is_described():
    assert all(evidence.machine(0).values())
