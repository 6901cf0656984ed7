"""The fusion methods as help texts list them: the names of `linlora.fusion.METHODS`, which takes seconds to import."""

FROM_FILES = (
    "average, task_arithmetic, negation; of one starting point ties and dare; in weight space tsv, iso_c, iso_cts, "
    "knots_ties, compress_then_merge and wudi_minimiser"
)
"""Those that need nothing but the vectors."""

METHOD_HELP = f"How to fuse: {FROM_FILES}."
