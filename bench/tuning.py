"""Tuning: every way to run a call is checked against float64, then timed in turns; the outcome is kept as evidence.

    calls       those of a grid, of a model's layers, or those that a model makes of a batch
    cases       of a call: its forms, forward alone and forward + backward, on random data, fresh memory poisoned
    candidates  composed torch, always; Triton and CUDA where they are there; where Triton is near, its neighbours
    time        the larger of device and host, in rounds of all candidates in turn, from a cold L2

What follows for dispatch is in `linlora.ops.evidence`; docs/tuning.md describes the whole.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from linlora.kernels.configs import Config
from torch import nn

from linlora.ops import backends, evidence
from linlora.ops.evidence import Call, Candidate, Entry
from linlora.storage.environment import commit, environment
from linlora.storage.files import write_text

from .cases import Case
from .providers import PROVIDERS, Provider
from .results import CaseResult
from .runner import run_case
from .tuning_neighbours import configurations, provider_of

RESULTS = Path(__file__).parent / "results"
_CANDIDATES = {name: PROVIDERS[f"linlora-{name}"] for name in ("torch", "triton", "cuda")}
_PEERS = {"F.linear": PROVIDERS["frozen"], "PEFT": PROVIDERS["peft"]}
_SECONDS = 0.1  # of a case and a provider: some twenty rounds
_NEAR = 0.7  # times as fast as composed torch: what is slower is not mended by a neighbour
_SIDES = ((4096, 4096), (1024, 1024))
_ROWS = (8192, 1024, 128, 16)


class TuneError(RuntimeError):
    """Nothing can be measured here, or no more; the message says why and what to do."""


class Tuning(NamedTuple):
    """The entries of the calls that were asked for; those that were measured before are among them."""

    entries: list[Entry]
    left: int = 0  # calls that no time was left for

    def __str__(self) -> str:
        from .tune_report import text

        return text(self.entries)


def tune(model: nn.Module, batch: Any, *, seconds: float | None = None) -> Tuning:
    """Prove the kernels on the calls that a model makes of a batch, and use the fastest from then on, here and in every
    later process on this machine. Calls that were measured before are not measured again.

    Args:
        model: on a CUDA GPU, linearized or accelerated. It runs forward once, without gradients.
        batch: what the model is called with: a mapping of keyword arguments, a tuple of arguments, or one tensor.
        seconds: about how long, or as long as it takes.

    Returns: every call's entry; `str()` of it is a table. In torch.distributed rank 0 measures and the others wait for
    what it finds.

    Raises TuneError where there is no GPU; what rank 0 raises, the others raise as a TuneError.

    >>> import linlora, torch
    >>> linlora.tune(torch.nn.Linear(2, 2), torch.ones(1, 2))
    Traceback (most recent call last):
    linlora.bench.tuning.TuneError: kernels are proven on a CUDA GPU, and the model is on cpu: composed torch runs there
    """
    device = next(model.parameters()).device
    if device.type not in backends.DECIDED:
        raise TuneError(f"kernels are proven on a CUDA GPU, and the model is on {device}: composed torch runs there")
    calls = calls_met(model, batch)
    group = torch.distributed if torch.distributed.is_available() and torch.distributed.is_initialized() else None
    if group is None:
        return measure_all(calls, device, seconds)
    made: list[Any] = [None]
    if group.get_rank() == 0:
        try:
            made = [measure_all(calls, device, seconds)]
        except Exception as error:  # the others wait for it: what they are told is why there is nothing
            group.broadcast_object_list([TuneError(f"rank 0: {error}")], src=0)
            raise
    group.broadcast_object_list(made, src=0)
    if isinstance(made[0], TuneError):
        raise made[0]
    if group.get_rank() != 0:
        evidence.add(made[0].entries, keep=False)
        backends.decide_again()
    return made[0]


def this_gpu() -> torch.device:
    """The GPU whose kernels are proven; CUDA_VISIBLE_DEVICES chooses among several. Raises TuneError without one."""
    if not torch.cuda.is_available():
        raise TuneError("kernels are timed on a CUDA GPU, and torch sees none: without one there is nothing to tune")
    return torch.device("cuda", torch.cuda.current_device())


def place(device: torch.device) -> Path:
    """The folder of this machine's entries."""
    return evidence.folder() / evidence.key(evidence.machine(device.index))


def measure_all(
    calls: Iterable[Call],
    device: torch.device,
    seconds: float | None = None,
    after: Callable[[Call], None] = lambda call: None,
    fresh: bool = False,
) -> Tuning:
    """Measure the calls that this machine has not measured, or `fresh` all of them, one process at a time. Every entry
    is kept as soon as it is made."""
    calls, end = list(calls), time.monotonic() + (float("inf") if seconds is None else seconds)
    with _alone(device):
        for done, call in enumerate(calls):
            if time.monotonic() > end:
                return Tuning(entries_of(calls, device), len(calls) - done)
            if fresh or not evidence.is_measured(call, device.index):
                evidence.add([measure(call, device)])
                backends.decide_again()
            after(call)
    return Tuning(entries_of(calls, device))


def measure(call: Call, device: torch.device) -> Entry:
    """The entry of a call. Raises TuneError where a candidate left the GPU unusable; its entry says so and is kept."""
    configs = configurations(call, device)
    unknown = _entry(call, device, [], {"torch": Candidate("failed", "not timed")}, {})
    made = _measured(unknown, device, _CANDIDATES, configs)
    speedup = made.speedup("triton") or 0.0
    if speedup < _NEAR and made.candidates["triton"].status != "failed":  # what fails may have too large a tile
        return made
    near = {name: provider_of(name) for name in configs if name not in _CANDIDATES}
    if not near:
        return made
    made = _measured(made, device, _CANDIDATES | near, configs)
    for name in near:
        candidate = made.candidates[name]
        if candidate.status != "green":
            print(f"linlora: {call}: {name} ({candidate.config}) is left out: {candidate.detail}", file=sys.stderr)
    return made


def _measured(known: Entry, device: torch.device, candidates: dict[str, Provider], configs: dict[str, Config]) -> Entry:
    """An entry with these candidates, all timed in turns; what was known is kept where one breaks the GPU."""
    call, cases, results = known.call, list(cases_of(known.call)), []
    providers = [*_PEERS.values(), *candidates.values()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _settled():
        for case in cases:
            results.append(run_case(case, providers, device, _SECONDS * len(providers), weighs=False))
            if (name := _broke(results[-1], device, candidates)) is not None:
                broken = Candidate("failed", "broke the GPU's context", config=configs.get(name))
                evidence.add([replace(known, candidates=known.candidates | {name: broken})])
                raise TuneError(f"{call}: the {name} kernel broke the GPU's context and is never chosen; go on with "
                                "the same command in a new process")  # fmt: skip
    outcomes = {
        name: replace(_candidate(results, provider.name), config=configs.get(name))
        for name, provider in candidates.items()
    }
    peers = {name: tuple(_time(result, provider.name) for result in results) for name, provider in _PEERS.items()}
    return _entry(call, device, cases, outcomes, peers)


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """What there is already is left out of collections of garbage, which every case begins with."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _entry(call: Call, device: torch.device, cases: list[Case], candidates: Any, peers: Any) -> Entry:
    names = tuple(f"{case.variant} {case.phase}{' causal' if case.causal else ''}" for case in cases)
    date = str(environment(device)["date"])
    return Entry(call, evidence.machine(device.index), date, commit(), names, candidates, peers)


def _candidate(results: list[CaseResult], provider: str) -> Candidate:
    """A candidate in all cases: the worst status counts."""
    outcomes = [result.outcomes.get(provider) for result in results]
    found = [outcome for outcome in outcomes if outcome is not None]
    if not found:
        return Candidate("unavailable", "it has no such op")
    for status in ("wrong", "failed", "unavailable"):
        if bad := [outcome for outcome in found if outcome.status == status]:
            return Candidate(status, bad[0].detail)
    times = tuple(time for result in results if (time := _time(result, provider)) is not None)
    if len(times) < len(results):
        return Candidate("failed", "not timed")
    return Candidate("green", "", max(max(outcome.errors.values()) for outcome in found), times)


def _time(result: CaseResult, provider: str) -> float | None:
    """Microseconds of a step: the device's or the host's, whichever a caller waits for."""
    outcome = result.outcomes.get(provider)
    if outcome is None or outcome.median_ms is None:
        return None
    return round(1e3 * max(outcome.median_ms, outcome.host_ms or 0.0), 3)


def _broke(result: CaseResult, device: torch.device, candidates: dict[str, Provider]) -> str | None:
    """The candidate that left the GPU's context unusable, which CUDA never mends."""
    failed = [name for name, provider in candidates.items() if provider.name in result.outcomes
              and result.outcomes[provider.name].status == "failed"]  # fmt: skip
    try:
        if device.type == "cuda" and failed:
            torch.cuda.synchronize(device)
    except RuntimeError:
        return next((name for name in failed if name != "torch"), "torch")
    return None


def entries_of(calls: Iterable[Call], device: torch.device) -> list[Entry]:
    """What decides these calls now."""
    found = (evidence.decisive(call, device.index) for call in calls)
    return list({id(entry): entry for entry in found if entry is not None}.values())


@contextlib.contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """One process measures on a machine at a time: two would time each other. The second finds what the first made."""
    lock = FileLock(place(device) / ".lock")
    try:
        place(device).mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"linlora: another process is measuring; waiting for it ({lock.lock_file})", file=sys.stderr)
            lock.acquire()
            evidence.forget()
    except OSError:  # `evidence.add` says that the cache cannot be written
        yield
        return
    try:
        yield
    finally:
        lock.release()


def cases_of(call: Call) -> Iterator[Case]:
    """The cases of a call: every form of the op, forward alone and with backward."""
    M, K, N = call.size
    of = {"dtype": call.dtype, "rank": call.rank or 16, "dropout": 0.1 if call.dropout else 0.0}
    plain = Case("tune", "tune", M, K, N, op=call.op, **of)  # type: ignore[arg-type]
    forms = [replace(plain, form="short"), replace(plain, form="pair")]
    if call.op == "lora_linear":
        forms = [replace(plain, form="pair")]
    elif call.op == "routed_lora_linear":
        examples = min(16, M)
        forms = [replace(plain, M=M - M % examples, batch=examples, tasks=min(8, examples), skills=8)]
    elif call.op == "attention":
        heads = replace(plain, K=K, N=K, rank=0, form="pair", heads=N)
        forms = [replace(heads, causal=causal) for causal in (True, False)]
    elif call.op != "linearized_lora_linear":
        forms = [replace(plain, rank=0, form="pair")]
    return (replace(form, phase=phase) for form in forms for phase in ("forward", "forward_backward"))


def grid(ranks: Iterable[int], dtype: str) -> list[Call]:
    """Every op at a few sizes, the most telling first; what lies between is decided by the nearest."""
    ranks = list(ranks)
    sizes = [(rows, *sides) for sides in _SIDES for rows in _ROWS]
    calls = [Call("linearized_lora_linear", size, dtype, rank) for rank in ranks for size in sizes]
    calls += [Call("linearized_lora_linear", size, dtype, ranks[0], True) for size in sizes]
    calls += [Call("lora_linear", size, dtype, rank, dropout) for dropout in (False, True) for rank in ranks[:1]
              for size in sizes]  # fmt: skip
    calls += [Call("attention", size, dtype) for size in ((4096, 128, 32), (512, 64, 128), (128, 64, 384))]
    for op in ("linear", "layer_norm", "rms_norm", "activation", "gated_activation", "routed_lora_linear"):
        calls += [Call(op, (rows, *sides), dtype) for sides in _SIDES for rows in (8192, 512)]
    return calls


def calls_of_layers(name: str, tokens: int, ranks: Iterable[int], dtype: str) -> list[Call]:
    """The calls of LoRA layers on every linear layer of a transformers model, of which only the config is read."""
    from transformers import AutoConfig, AutoModel
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(name))
    sides = dict.fromkeys(
        tuple(layer.weight.shape) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
        for layer in model.modules()
        if isinstance(layer, nn.Linear | Conv1D)
    )
    ops = ("linearized_lora_linear", "lora_linear")
    return [Call(op, (tokens, k, n), dtype, rank) for op in ops for rank in ranks for k, n in sides]


def calls_met(model: nn.Module, batch: Any) -> list[Call]:
    """The calls that evidence decides when a model runs a batch."""
    backends.decide_again()
    with torch.no_grad():
        if isinstance(batch, Mapping):
            model(**batch)
        else:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    return [call for call in backends.calls_met() if call.dtype is not None]


def export(file: Path, device: torch.device) -> int:
    """Write every entry of this machine to a file; the number of entries. A file of a checkout's bench/results/ is
    entered into the table that the package holds."""
    entries = [entry.as_json() for entry in evidence.own_entries(device.index)]
    write_text(file, json.dumps({"environment": environment(device), "entries": entries}, indent=1) + "\n")
    if RESULTS in file.resolve().parents:
        write_text(evidence.TABLE, table(RESULTS))
    return len(entries)


def table(results: Path) -> str:
    """linlora/ops/evidence.json: the newest entry of every call on every GPU in the files under bench/results/."""
    contents = [json.loads(file.read_text()) for file in sorted(results.glob("*/*.json"))]
    entries = sorted((entry for of in contents for entry in of.get("entries", ())), key=lambda entry: entry["date"])
    newest = {(entry["machine"]["gpu"], json.dumps(entry["call"])): json.dumps(entry) for entry in entries}
    return "[" + ",".join(f"\n{line}" for line in newest.values()) + "\n]\n"
