"""Measures fusion in weight space on the packaged digits; writes README.md's table, numbers and a picture.

python examples/controls/weight_space.py     # interrupted, it continues
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path

from linlora import experiments, quickstart
from linlora.experiments.images import ImageExperiment
from linlora.experiments.options import Options
from linlora.experiments.report import markdown

HERE = Path(__file__).parent
LAMBDAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0)
"""One grid for every method."""
OPTIONS = Options(
    methods=(
        "average", "task_arithmetic", "ties", "dare", "tsv", "iso_c", "iso_cts", "knots_ties", "compress_then_merge",
        "wudi_minimiser", "regmean", "soup",
    ),
    scalings=LAMBDAS, ties_scalings=LAMBDAS, dare_scalings=LAMBDAS, weights_scalings=LAMBDAS, negation_scalings=(),
    map_scalings=(),
)  # fmt: skip
SETTINGS = dataclasses.replace(
    quickstart.CONTROLS, starts=("zero",), controls=("delta_weight", "layer"), options=OPTIONS
)


def main(out: Path) -> None:
    results = experiments.run(ImageExperiment(SETTINGS, out), "weight space", workers=1)
    shutil.copyfile(out / "results.json", HERE / "weight_space.json")
    shutil.copyfile(out / "scores.png", HERE / "weight_space.png")
    readme = HERE / "README.md"
    before, after = re.split(r"(?s)(?<=<!-- weight_space\.py -->\n).*(?=<!-- end -->)", readme.read_text())
    readme.write_text(f"{before}\n{markdown(results)}\n{after}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/weight_space"))
