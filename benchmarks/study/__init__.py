"""Scripts that repeat the experiments and counts of the papers, one question each.

They run from a clone of the repository (python -m benchmarks.study.NAME) and are not part of the
wheel. Nothing imports them, so they may import every package, including edgewhisper, which the rest
of benchmarks must not. `readme` writes the stored results' tables into the documentation; `digits`
trains the embedded model.
"""
