"""The evidence by which a backend is chosen: what this machine, or the runs in the package, measured of every backend.

An entry is one call that `linlora tune` checked against float64 and timed, with every candidate's outcome. It holds on
the machine that made it: the same GPU, driver, torch, Triton and sources of linlora's ops and kernels. Entries of
this machine are files under `$XDG_CACHE_HOME/linlora/evidence`, one an entry; those in the package (evidence.json, from
bench/results/) hold on GPUs of their architecture while the sources are the same. A machine's own come first.

A call is decided by the nearest entry: the same op, dtype and dropout, a rank that is no lower, and a size within
`REACH` octaves in all, everything rounded up to powers of two. Nothing nearer than that: composed torch. docs/tuning.md
has the rules and the JSON.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import linlora.kernels as kernels
from linlora.kernels.configs import Config
from linlora.ops.cuda import library
from linlora.ops.neighbours import backend_of
from linlora.storage.environment import environment
from linlora.storage.files import CorruptFileError, read_json, write_text

TABLE = Path(__file__).with_name("evidence.json")
REACH = 3.0
"""Octaves of rows, inputs and outputs together between a call and the entry that decides it."""
MARGIN = 1.02
"""Times faster than composed torch in every case that a kernel has to be: a tie is not worth a change."""
Size = tuple[int, int, int]
LARGE: Size = (8192, 4096, 4096)
"""The size of the calls that training is made of, for those that do not say theirs."""


def power_of_two(n: int) -> int:
    """n rounded up, 16 at the least: sizes that differ by less are decided alike.

    >>> power_of_two(1), power_of_two(4096), power_of_two(14336)
    (16, 4096, 16384)
    """
    power = 16
    while power < n:  # torch.compile traces this for a symbolic n too
        power *= 2
    return power


class Call(NamedTuple):
    """What a decision depends on. `size` is (rows, inputs, outputs) of a layer; of a norm or an activation (rows,
    features, features), of attention (length, head size, heads of the batch)."""

    op: str
    size: Size
    dtype: str | None  # None: any
    rank: int = 0
    dropout: bool = False

    def __str__(self) -> str:
        rank, dropout = f" r{self.rank}" if self.rank else "", " dropout" if self.dropout else ""
        return f"{self.op} {'×'.join(map(str, self.size))}{rank}{dropout} {self.dtype or 'any dtype'}"

    def distance(self, entry: Call) -> float:
        """Octaves between the sizes; infinite where an entry says nothing about this call."""
        same = (self.op, self.dropout) == (entry.op, entry.dropout) and self.dtype in (None, entry.dtype)
        if not same or power_of_two(entry.rank) < self.rank:
            return math.inf
        sides = zip(self.size, entry.size, strict=True)
        return sum(abs(math.log2(power_of_two(a) / power_of_two(b))) for a, b in sides)


@dataclass(frozen=True)
class Candidate:
    """What became of one way to run a call: "green", "wrong", "failed" or "unavailable"; of a green one the larger of
    device and host time in every case, and the largest relative error against float64. `config` is what a Triton kernel
    was launched with."""

    status: str
    detail: str = ""
    error: float | None = None
    microseconds: tuple[float, ...] = ()
    config: Config | None = None


@dataclass(frozen=True)
class Entry:
    """One call as a machine measured it. `peers` are times of F.linear and PEFT in the same cases; None: none there."""

    call: Call
    machine: dict[str, str]
    date: str
    commit: str
    cases: tuple[str, ...]
    candidates: dict[str, Candidate]
    peers: dict[str, tuple[float | None, ...]]

    def speedup(self, name: str) -> float | None:
        """Times faster than composed torch, in the worst case; None of what was not timed."""
        of, torch_ = self.candidates.get(name), self.candidates["torch"]
        if of is None or of.status != "green" or torch_.status != "green":
            return None
        return min(a / b for a, b in zip(torch_.microseconds, of.microseconds, strict=True))

    def over(self, peer: str, name: str) -> float | None:
        """The time of a candidate over a peer's, all cases that the peer has together."""
        of = self.candidates[name].microseconds
        pairs = [(a, b) for a, b in zip(of, self.peers.get(peer, ()), strict=False) if b is not None]
        return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None

    @property
    def ranking(self) -> list[str]:
        """The candidates that are proven, correct and faster than composed torch, the fastest first. Neighbours of a
        configuration have to be faster than it too: the best of many draws is no better for being drawn."""
        speeds = {name: self.speedup(name) or 0.0 for name in self.candidates if name != "torch"}
        rows = {name: speeds.get(backend_of(name), 0.0) for name in speeds if name != backend_of(name)}
        proven = [name for name, speed in speeds.items() if speed >= MARGIN * max(1.0, rows.get(name, 1.0))]
        return sorted(proven, key=lambda name: -speeds[name])

    def best(self, backend: str) -> str:
        """The fastest candidate of a backend: itself, or one of its neighbours."""
        of = [name for name in (backend, *self.candidates) if backend_of(name) == backend]
        return max(of, key=lambda name: self.speedup(name) or 0.0)

    def __str__(self) -> str:
        return f"{self.call}, {self.machine['gpu']}, {self.date[:10]}"

    def verdict(self, name: str) -> str:
        """The outcome of a candidate in words."""
        of, speedup = self.candidates.get(name), self.speedup(name)
        if of is None or (speedup is None and of.status == "green"):
            return "not measured"
        if speedup is None:
            return f"{of.status} ({of.detail})"
        changed = f" by {of.config} ({name.partition(' ')[2]})" if " " in name and of.config is not None else ""
        return f"{speedup:.2f}x composed torch{changed}"

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, which `parse` reads."""
        return asdict(self) | {"call": self.call._asdict()}

    @staticmethod
    def parse(content: dict[str, Any]) -> Entry:
        """Read an entry. Raises KeyError, TypeError or ValueError for what is none."""
        call = Call(**{**content["call"], "size": tuple(map(int, content["call"]["size"]))})
        candidates = {name: _candidate(**of) for name, of in content["candidates"].items()}
        cases, machine = tuple(content["cases"]), {str(key): str(of) for key, of in content["machine"].items()}
        times = [of.microseconds for of in candidates.values() if of.status == "green"]
        if len(call.size) != 3 or any(len(of) != len(cases) or min(of, default=0.0) <= 0.0 for of in times):
            raise ValueError("a time a case, and a size of three are expected")
        if "torch" not in candidates or "gpu" not in machine:
            raise ValueError("composed torch and the GPU's name are expected")
        peers = {name: tuple(of) for name, of in content["peers"].items()}
        return Entry(call, machine, str(content["date"]), str(content["commit"]), cases, candidates, peers)


def _candidate(microseconds: Iterable[float], config: dict[str, Any] | None = None, **of: Any) -> Candidate:
    return Candidate(
        microseconds=tuple(map(float, microseconds)), config=None if config is None else Config(**config), **of
    )


def decisive(call: Call, index: int | None) -> Entry | None:
    """The entry that decides a call on a GPU, this machine's before the package's; None where nothing is near."""
    for found in (own_entries(index), of_package(index)):
        near = [entry for entry in found if call.distance(entry.call) <= REACH]
        if near:
            return min(near, key=lambda entry: (entry.call.rank, call.distance(entry.call), _age(entry)))
    return None


def own_entries(index: int | None) -> list[Entry]:
    """What this machine has measured on a GPU."""
    return list(_kept(key(machine(index))).values())


def is_measured(call: Call, index: int | None) -> bool:
    """Whether this machine has an entry of a call, or of one that is decided alike."""
    return _file_name(call) in _kept(key(machine(index)))


def executed_on(op: str, backend: str) -> list[str]:
    """The GPUs on which a backend has run an op, right or wrong: by the package, and by this machine."""
    entries = [*shipped(), *(entry for i in range(torch.cuda.device_count()) for entry in own_entries(i))]
    outcomes = ((entry, entry.candidates.get(backend)) for entry in entries if entry.call.op == op)
    ran = (entry.machine["gpu"] for entry, of in outcomes if of is not None and of.status in ("green", "wrong"))
    return list(dict.fromkeys(ran))


def add(entries: Iterable[Entry], keep: bool = True) -> None:
    """Take entries into account from now on; `keep` writes each to its file, whole or not at all."""
    for entry in entries:
        about_key = key(entry.machine)
        file = folder() / about_key / _file_name(entry.call)
        _kept(about_key)[file.name] = entry
        try:
            if keep:
                write_text(file, json.dumps(entry.as_json(), indent=1) + "\n")
        except OSError as error:
            _say_once(f"{file.parent} cannot be written ({error.strerror}): the evidence holds for this process alone")


def forget() -> None:
    """Read the files again when they are next asked for."""
    for cache in (_kept, shipped, _say_once):
        cache.cache_clear()


def folder() -> Path:
    """Where the entries of all machines that share this home are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "linlora" / "evidence"


def key(about: dict[str, str]) -> str:
    """The folder of a machine's entries: the GPU for people, and a hash of everything."""
    gpu = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower().replace("nvidia", "")).strip("-")
    return f"{gpu}-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}"


@functools.cache
def machine(index: int | None) -> dict[str, str]:
    """What evidence depends on beside the call: the GPU, its driver, the versions and the sources."""
    major, minor = torch.cuda.get_device_capability(index)
    return {
        "gpu": torch.cuda.get_device_name(index),
        "architecture": f"sm_{major}{minor}",
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "sources": sources(),
    }


def sources() -> str:
    """A hash of the Triton kernels with their table of configurations, of the composed ops, and of what is built of
    csrc/."""
    digest = hashlib.sha256(json.dumps(library.status(), sort_keys=True).encode())
    for folder in (Path(kernels.__file__).parent, Path(__file__).parent / "aten"):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def shipped() -> tuple[Entry, ...]:
    """Every entry in the package."""
    return tuple(Entry.parse(entry) for entry in json.loads(TABLE.read_text()))


def of_package(index: int | None) -> list[Entry]:
    """What the package holds for a GPU's architecture and these sources."""
    about = machine(index)
    same = ("architecture", "sources")
    return [entry for entry in shipped() if all(entry.machine.get(of) == about[of] for of in same)]


@functools.cache
def _kept(about_key: str) -> dict[str, Entry]:
    """A machine's entries by file: those in its folder, where a damaged one is named and left out and a foreign one is
    none, and those that `add` was given since."""
    found = {}
    for file in sorted((folder() / about_key).glob("*.json")):
        try:
            entry = Entry.parse(read_json(file))
        except (OSError, CorruptFileError, KeyError, TypeError, ValueError, AttributeError) as error:
            _say_once(f"{file} is damaged and ignored ({type(error).__name__}: {error}); `linlora tune` makes it again")
            continue
        if key(entry.machine) == about_key:
            found[file.name] = entry
    return found


def _age(entry: Entry) -> float:
    return -float(re.sub(r"\D", "", entry.date)[:14] or 0)


def _file_name(call: Call) -> str:
    """One file for all calls that are decided alike."""
    rows, inputs, outputs = map(power_of_two, call.size)
    same = call._replace(size=(rows, inputs, outputs))
    return re.sub(r"[^A-Za-z0-9_]+", "-", str(same).replace("×", "x")) + ".json"


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return str(environment("cuda")["driver"])
    return next(iter(re.findall(r"\d+\.\d+(?:\.\d+)?", text)), "unknown")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _say_once(message: str) -> None:
    print(f"linlora: {message}", file=sys.stderr)
