"""Experiments: adapters trained, fused and compared, from a description to a report.

`linlora quickstart` and `linlora compare` run them.

    run          an experiment is settings, jobs and a report; `run` does what its run directory lacks
    jobs         the steps, each a folder that is whole or absent, in worker processes
    comparison   starts, kinds of training, controls, fusion methods, seeds
    images       such a comparison on images in memory: the quickstart's
    recipes      such a comparison on the tasks of a recipe: any model and data sets that `linlora train` takes
    adapters     the user's own adapters on the user's own tasks: which method, which λ
    fusing       one control's adapters fused by every method, options chosen on validation
    report       tables, pictures, and what they say

`controls` says why the same adapters are added in several ways.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
