"""Every number of the packaged experiments, with the measurement behind those that were chosen."""

from __future__ import annotations

from dataclasses import replace

from linlora.experiments.images import Settings
from linlora.experiments.options import Options
from linlora.quickstart.digits import Digits

QUICKSTART = Settings(
    data=Digits(),
    # Chosen for each kind of training by the mean validation accuracy of its single-task adapters, seed 0:
    #     B0 = 0, learning rate    1e-3    3e-3    5e-3    1e-2    2e-2
    #     LoRA                    0.900   0.937   0.946   0.916   0.664
    #     layer scope             0.887   0.910   0.928   0.914   0.866
    #     model scope             0.875   0.895   0.901   0.907   0.905
    #     B0 != 0, learning rate   1e-3    3e-3    5e-3    1e-2    2e-2
    #     LoRA                    0.919   0.943   0.945   0.904   0.617
    #     LoRA-FA                     –   0.927   0.935   0.948   0.930
    #     layer scope             0.914   0.931   0.940   0.921   0.888
    #     model scope                 –   0.918   0.923   0.916   0.916
    # How well the adapters fuse had no say in it.
    learning_rates=(
        ("zero", "lora", 5e-3), ("zero", "layer", 5e-3), ("zero", "model", 1e-2),
        ("warm", "lora", 5e-3), ("warm", "lora-fa", 1e-2), ("warm", "layer", 5e-3), ("warm", "model", 5e-3),
    ),
    options=Options(methods=("average", "task_arithmetic", "sum"), negation_scalings=(), map_scalings=()),
    kept=("average", "task_arithmetic"),
    timed_steps=40,
    # CPU threads. The tensors are so small that a second thread gains nothing (32 ms a step of pre-training with two,
    # 31 ms with one), and where cores are shared two that wait for each other cost a lot (3 s a fine-tuning became
    # 20 to 90 s; with one thread 4 s). With one, results do not depend on the number of cores either.
    threads=1,
)  # fmt: skip
"""The quickstart: from B0 = 0, averages and task arithmetic, with step times."""

CONTROLS = replace(QUICKSTART, starts=("zero", "warm"), options=Options(), kept=(), timed_steps=0)
"""`linlora compare` without tasks of the user's: every control by every method, from both starts."""
