"""Prepared data -> the same with hard negatives in cl, and an audit of how they were chosen.

    from lbr_ds.mining.mine import mine
    audit = mine(config)

1. The passages of cl (and gl) are the pool, eval is never read for candidates (`pool.py`).
2. Each method ranks the pool for each query: `bm25.py` by words, `dense.py` by a model's vectors.
3. `rules.py` leaves out what may be an answer; `mine.py` writes what is kept.
4. If the recipe names a teacher, `teach.py` adds its scores and vectors.

The only door for bm25s. Never imports mteb, `evaluate` or `train`.
"""

from __future__ import annotations
