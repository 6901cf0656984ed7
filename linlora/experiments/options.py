"""The grid of options: the values that `linlora compare` and `linlora eval --search` try of every fusion method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from linlora.fusion import grid
from linlora.fusion.registry import IN_WEIGHT_SPACE
from linlora.training.setting import unknown

METHOD_TITLES = {
    "average": "average", "task_arithmetic": "task arithmetic, best λ", "sum": "task arithmetic, λ = 1", "ties": "TIES",
    "dare": "DARE", "lorahub": "LoraHub", "adamerging": "AdaMerging", "tsv": "TSV-M", "iso_c": "Iso-C",
    "iso_cts": "Iso-CTS", "knots_ties": "KnOTS-TIES", "compress_then_merge": "Compress-then-Merge",
    "wudi_minimiser": "WUDI's minimiser", "regmean": "RegMean", "soup": "LoRA-Soups",
}  # fmt: skip
ROWS = tuple(METHOD_TITLES)


@dataclass(frozen=True)
class Options:
    """Grids are searched on the validation split; of equal options the first wins, so the mildest come first."""

    methods: tuple[str, ...] = ROWS
    # task arithmetic
    scalings: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    ties_keep: tuple[float, ...] = (0.2, 0.5)
    ties_scalings: tuple[float, ...] = (0.2, 0.5, 1.0, 1.5)
    dare_drop: tuple[float, ...] = (0.5, 0.9)
    dare_scalings: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    # of each task, labelled: LoraHub's objective is the loss on these. Its paper has 5 for one new task.
    lorahub_examples: int = 16
    lorahub_budget: int = 40
    # A coefficient for each task and one for each layer of it. Adam moves one by at most steps x learning rate: 0.05,
    # or the 0.5 of the published 500 x 1e-3, which start from 0.3.
    adamerging_initial: tuple[float, ...] = (0.1, 0.3)
    adamerging_learning_rates: tuple[float, ...] = (1e-3, 1e-2)
    adamerging_steps: int = 50
    adamerging_batch: int = 16
    # λ of the methods of ΔW, whose results have a size of their own
    weights_scalings: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
    regmean_shrink: tuple[float, ...] = (0.95,)
    regmean_examples: int = 256  # of each task, unlabeled, as published
    # LoRA-Soups: labeled examples of each task, gone through so often
    soup_examples: int = 64
    soup_epochs: int = 5
    soup_learning_rates: tuple[float, ...] = (1e-2, 1e-1)
    # forgetting: the largest of these that keeps 95 % of the score of the other tasks; none is tried for ()
    negation_scalings: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    negation_keeps: float = 0.95
    # the map of the disentanglement error of the first two tasks, of the first seed; none for ()
    map_scalings: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in ROWS]
        if unknown or not self.methods:
            raise ValueError(f"methods: choose from {', '.join(ROWS)}, got {', '.join(unknown) or 'none'}")
        for option in fields(self):
            value = getattr(self, option.name)
            if value == () and option.name not in ("negation_scalings", "map_scalings"):
                raise ValueError(f"{option.name}: there has to be a value to try")
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{option.name} has to be 1 or more, got {value}")

    @classmethod
    def of_values(cls, values: Mapping[str, Any], where: str, beside: Sequence[str] = ()) -> Options:
        """Options from plain values, as a recipe holds them; an unknown key is an error with the nearest, or all.

        Args:
            beside: other keys that may stand there, for the message.

        >>> Options.of_values({"methods": "ties", "ties_keep": [0.1, 0.3]}, "--set").choices("ties")[0]
        {'keep': 0.1, 'scaling': 0.2}
        >>> Options.of_values({"ties_kep": [0.1]}, "--set")
        Traceback (most recent call last):
        ValueError: --set: unknown key 'ties_kep'; did you mean 'ties_keep'?
        """
        known = [f.name for f in fields(cls)]
        given: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise unknown(where, key, [*beside, *(name for name in known if name != "methods")])
            if key == "methods":
                given[key] = tuple(dict.fromkeys(map(str, value if isinstance(value, list) else [value])))
            else:
                given[key] = _like(f"{where} {key}", value, getattr(cls, key))
        return cls(**given)

    def choices(self, method: str, given: Mapping[str, Sequence[Any]] | None = None) -> list[dict[str, Any]]:
        """The options of a method to search, those that are given in place of its own; one choice needs no search.

        >>> Options(ties_scalings=(1.0,)).choices("ties", {"keep": [0.2, 0.5]})
        [{'keep': 0.2, 'scaling': 1.0}, {'keep': 0.5, 'scaling': 1.0}]
        """
        grids: dict[str, dict[str, Sequence[Any]]] = {
            "task_arithmetic": {"scaling": self.scalings},
            "negation": {"scaling": self.scalings},
            "sum": {"scaling": [1.0]},
            "ties": {"keep": self.ties_keep, "scaling": self.ties_scalings},
            "dare": {"drop": self.dare_drop, "scaling": self.dare_scalings},
            "lorahub": {"budget": [self.lorahub_budget]},
            "adamerging": {
                "level": ["task", "layer"], "initial": self.adamerging_initial,
                "learning_rate": self.adamerging_learning_rates, "steps": [self.adamerging_steps],
            },
            "regmean": {"shrink": self.regmean_shrink, "scaling": self.weights_scalings},
            "soup": {"learning_rate": self.soup_learning_rates, "epochs": [self.soup_epochs]},
        }  # fmt: skip
        of_weights = {"scaling": self.weights_scalings} if method in IN_WEIGHT_SPACE else {}
        return grid(**{**grids.get(method, of_weights), **(given or {})})


SEEDED = ("dare", "lorahub")
"""The methods that draw random numbers."""


def fusion_method(method: str) -> str:
    """The name in `linlora.fusion.METHODS` of a row of the table."""
    return "task_arithmetic" if method == "sum" else method


def in_words(options: Mapping[str, Any]) -> str:
    """Options of a method.

    >>> in_words({"keep": 0.2, "scaling": 1.0})
    'keep 0.2, scaling 1.0'
    """
    return ", ".join(f"{name} {value}" for name, value in options.items())


def described(section: Mapping[str, Any], where: str) -> tuple[int, Options, dict[str, float]]:
    """Seeds, options and learning rates of the section `experiment` of a recipe, or of flags.

    >>> described({"seeds": 1, "methods": ["ties"], "ties_keep": 0.1, "learning_rates": {"model": 1e-3}}, "r.yaml")[::2]
    (1, {'model': 0.001})
    """
    values = dict(section)
    seeds, rates = values.pop("seeds", 3), values.pop("learning_rates", {})
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"{where}: seeds is a whole number, 1 or more, got {seeds!r}")
    if not isinstance(rates, Mapping):
        raise ValueError(f"{where}: learning_rates is a section of 'method: rate' lines, got {rates!r}")
    options = Options.of_values(values, where, ("seeds", "methods", "learning_rates"))
    return seeds, options, {name: _like(f"{where} learning_rates.{name}", rate, 0.0) for name, rate in rates.items()}


def learning_rates(assignments: Sequence[str]) -> dict[str, float]:
    """Rates by method from flags like 'model=1e-3'.

    >>> learning_rates(["lora=1e-4", "model=0.001"])
    {'lora': 0.0001, 'model': 0.001}
    """
    rates = {}
    for assignment in assignments:
        method, _, rate = assignment.partition("=")
        try:
            rates[method] = float(rate)
        except ValueError:
            raise ValueError(f"--learning-rate {assignment}: expected METHOD=RATE, as in model=1e-3") from None
    return rates


def _like(where: str, value: Any, default: Any) -> Any:
    """A value of the kind of the default: a number, a whole one, or a list of numbers (one number is a list of one)."""
    several = isinstance(default, tuple)
    values = value if several and isinstance(value, list) else [value]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{where}: expected {'numbers, as [0.1, 0.2]' if several else 'a number'}, got {value!r}")
    if several:
        return tuple(float(v) for v in values)
    if isinstance(default, int) and value != int(value):
        raise ValueError(f"{where}: expected a whole number, got {value!r}")
    return type(default)(value)
