"""`linlora tune` on a GPU that the CPU plays: worker.py FOLDER ARGUMENT..., with a pause at every call."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_gpu import FakeKernels
from linlora.bench import tuning

from linlora.cli import app

measure = tuning.measure
tuning.grid = lambda ranks, dtype: [tuning.Call("lora_linear", (16 * 2**i, 16, 16), dtype, 4) for i in range(4)]


def slowly(*call):
    print("measuring", flush=True)
    time.sleep(float(os.environ["PAUSE"]))
    return measure(*call)


tuning.measure = slowly
with FakeKernels(Path(sys.argv[1])):
    app(sys.argv[2:])
