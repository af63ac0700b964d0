"""The ideas of the paper, one file each, on plain tensors. No rank, no DeepSpeed, no model.

ib_segments.py       the information bottleneck as causal attention over two segments
generative.py        stage 1: the next-token loss of Y through the bottleneck
bag_of_words.py      stage 1, optional: the last bottleneck state predicts all tokens of Y at once
info_nce.py          stage 2: InfoNCE over candidates of all ranks, a tile of scores at a time
false_negatives.py   the mask of InfoNCE: groups, known answers, placeholders
teacher_scores.py    stage 2, optional: a teacher's scores of a query's own candidates
teacher_vectors.py   stage 2, optional: a teacher's similarities of a query to all candidates
gradient_caching.py  a contrastive loss over more sequences than fit in memory

Each file begins with the formula and an example, which tests run.
"""
