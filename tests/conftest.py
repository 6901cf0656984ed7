"""The tests are the same on every machine: what they would take from the one they run on is set here.

Everything runs on the GPU where there is one; elsewhere Triton's kernels run in its interpreter, on the CPU. What is
random has the seed of `--seed`; `make test-everywhere` tries several, in other orders and by every instruction set.
"""

import atexit
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import hypothesis
import numpy as np
import pytest

FOREIGN = (
    "LINLORA_", "HF_", "TRANSFORMERS_", "DATASETS_", "ACCELERATE_", "FSDP_", "WANDB_", "TORCH",
    "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_",
    "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "CLICOLOR", "TTY_", "TYPER_", "_TYPER_", "GITHUB_ACTIONS", "CI",
    "PYTEST_ADDOPTS",
)  # fmt: skip
"""Beginnings of variables that change what is computed, where files are kept, who else takes part, what is printed."""


def _at_home_nowhere() -> None:
    """Removes those variables, for the processes that tests start too, and keeps downloads and caches out of $HOME."""
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    caches = tempfile.mkdtemp(prefix="linlora-tests-")
    atexit.register(shutil.rmtree, caches, ignore_errors=True)
    os.environ.update(
        HF_HOME=caches, XDG_CACHE_HOME=caches, HF_HUB_OFFLINE="1", MPLCONFIGDIR=caches, MPLBACKEND="Agg", TERM="xterm"
    )
    os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and the workers share the cores
    os.environ.pop("MKL_NUM_THREADS", None)


_at_home_nowhere()

import torch  # noqa: E402

import linlora  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

sys.path.insert(0, str(Path(__file__).parent / "csrc"))  # emulated, emulator
sys.path.insert(0, str(Path(__file__).parent))  # fake_gpu

# A busy machine takes its time: an example that is slow is not wrong.
hypothesis.settings.register_profile(
    "any seed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], database=None
)
hypothesis.settings.register_profile("one seed", hypothesis.settings.get_profile("any seed"), derandomize=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="of what is random; the order of the tests too if it is not 0")


def pytest_configure(config: pytest.Config) -> None:
    fixed = config.getoption("--hypothesis-seed") is None
    hypothesis.settings.load_profile("one seed" if fixed else "any seed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files in another order, and so the tests of each: what its fixtures share is made once all the same."""
    if seed := config.getoption("--seed"):
        places = {item.path: random.Random(f"{seed} {item.path.name}").random() for item in items}
        items.sort(key=lambda item: (places[item.path], random.Random(f"{seed} {item.nodeid}").random()))


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[object]:
    """A GPU that the CPU plays, with an empty cache of evidence."""
    from fake_gpu import FakeGpu

    with FakeGpu(tmp_path) as played:
        yield played


@pytest.fixture
def cuda_kernels(device: str) -> Iterator[None]:
    """The kernels of csrc/ serve the tensors of `device`: on the GPU, or emulated on the CPU."""
    import emulated

    from linlora.ops import cuda

    if device == "cpu" and emulated.build.compiler() is None:
        pytest.skip("no C++ compiler (g++ or clang++) to build the emulated kernels with")
    with emulated.operators() if device == "cpu" else nullcontext():
        if (obstacle := cuda.availability(torch.device(device))) is not None:
            pytest.skip(obstacle)
        yield


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms, softmax and some losses in float32, whatever the model; here that means float64."""
    for name in linlora.__all__:  # tables of dtypes are made when their module is imported, which is now
        getattr(linlora, name)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture(scope="session")
def patience() -> float:
    """Seconds after which a process that does not end has failed: far more than the busiest machine needs."""
    return 1800.0


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--seed")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
