"""Controls that make a comparison of fused adapters honest: `linlora compare`.

The same adapters added as factors and as ΔW, adapters with A frozen, and adapters linearized at layer and at model
scope (`controls`), each fused by every method with options chosen on a validation split (`fuse`): on the quickstart's
digits (`run`), or on the tasks of a recipe (`recipe`).
"""

from linlora.comparison.digits import Settings
from linlora.comparison.recipe import compare_recipe
from linlora.comparison.run import compare_digits
from linlora.comparison.settings import Options, learning_rates

__all__ = ["Options", "Settings", "compare_digits", "compare_recipe", "learning_rates"]
