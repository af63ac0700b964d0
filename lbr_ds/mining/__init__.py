"""Add hard negatives to cl of prepared data, with an audit of how they were chosen.

    from lbr_ds.mining.mine import mine
    audit = mine(config)

1. The passages of cl (and gl) are the pool. Passages of eval are never candidates (`pool.py`).
2. Each method ranks the pool for each query: `bm25.py` by words, `dense.py` by a model's vectors.
3. `rules.py` drops candidates that may be answers; `mine.py` writes the others.
4. If the recipe names a teacher, `teach.py` adds its scores and vectors.

Only this package imports bm25s. It never imports mteb, `evaluate` or `train`.
"""

from __future__ import annotations
