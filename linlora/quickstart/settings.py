"""Every number of the packaged experiments, with the measurement behind those that were chosen."""

from __future__ import annotations

from linlora.experiments.images import Settings
from linlora.experiments.options import Options
from linlora.quickstart.digits import Digits
from linlora.quickstart.glyphs import Glyphs

QUICKSTART = Settings(
    # Five of the six tasks, few steps and few λ: minutes on two cores.
    data=Glyphs(("digits", "arabic", "syllabics", "georgian", "hebrew")),
    # By the mean validation accuracy in % of the single-task adapters, seed 0:
    #     learning rate    5e-3   1e-2   2e-2   4e-2
    #     LoRA             92.2   92.9   90.5      –
    #     layer scope         –   92.4   93.0   91.6
    #     model scope      89.3   90.8   91.0   90.8
    # How well the adapters fuse had no say in it.
    learning_rates=(("zero", "lora", 1e-2), ("zero", "layer", 2e-2), ("zero", "model", 2e-2)),
    options=Options(
        methods=("average", "task_arithmetic", "sum", "tsv", "iso_c"), negation_scalings=(), map_scalings=(),
        scalings=(0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0), weights_scalings=(0.5, 1.0, 1.5),
    ),
    kept=("average", "task_arithmetic"),
    steps=60,
    batch=40,
    timed_steps=15,
)  # fmt: skip
"""The quickstart: from B0 = 0, averages, task arithmetic and two methods of ΔW, with step times."""

CONTROLS = Settings(
    data=Digits(),
    # By the mean validation accuracy of the single-task adapters, seed 0:
    #     B0 = 0, learning rate    1e-3    3e-3    5e-3    1e-2    2e-2
    #     LoRA                    0.900   0.937   0.946   0.916   0.664
    #     layer scope             0.887   0.910   0.928   0.914   0.866
    #     model scope             0.875   0.895   0.901   0.907   0.905
    #     B0 != 0                  1e-3    3e-3    5e-3    1e-2    2e-2
    #     LoRA                    0.919   0.943   0.945   0.904   0.617
    #     LoRA-FA                     –   0.927   0.935   0.948   0.930
    #     layer scope             0.914   0.931   0.940   0.921   0.888
    #     model scope                 –   0.918   0.923   0.916   0.916
    learning_rates=(
        ("zero", "lora", 5e-3), ("zero", "layer", 5e-3), ("zero", "model", 1e-2),
        ("warm", "lora", 5e-3), ("warm", "lora-fa", 1e-2), ("warm", "layer", 5e-3), ("warm", "model", 5e-3),
    ),
    starts=("zero", "warm"),
)  # fmt: skip
"""`linlora compare` without tasks of the user's: every control by every method, from both starts."""
