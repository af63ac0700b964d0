"""A model of ours -> how well it still writes: BLEU-4 and ROUGE-L of its answers (paper, Table 2).

Two prompts, both as in training:

| prompt       | the answer sees                  |                                       |
|--------------|----------------------------------|---------------------------------------|
| `visible`    | X and B (without B: X, its end)  | what the model knows                  |
| `bottleneck` | B alone                          | what passes through the bottleneck    |

Answers are written greedily. References are all right passages of the query; BLEU-4 is sacrebleu's
(of the whole set), ROUGE-L rouge-score's (F1, best reference, mean over queries), both 0 to 100.
rouge-score counts words of a-z and 0-9 only, so it is of no use for other scripts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from lbr_ds.batching import Sequence
from lbr_ds.evaluate.tasks import Judgements

if TYPE_CHECKING:
    from lbr_ds.model.encoder import PackedEncoder

_EXAMPLES = 3


def score_generation(folder: Path, judged: Judgements) -> dict[str, Any]:
    """Write an answer to each query of `judged` and score it; folder: one with `lbr.json`.

    An answer is cut where the longest reference ends: the same for models of one tokenizer.
    Returns {"queries", "max_new_tokens", "prompts": {prompt: {"bleu_4", "rouge_l", "words": mean
    length, "examples": [{"query", "written", "reference"}]}}, "per_query": {prompt: {query id:
    rouge_l}}}.
    """
    from lbr_ds.model.encoder import PackedEncoder
    from lbr_ds.model.generate import write

    model = PackedEncoder(folder)
    ids, queries = list(judged.queries), list(judged.queries.values())
    references = [[judged.documents[d] for d in judged.relevant[i]] for i in ids]
    limit = _longest(model, references)
    found: dict[str, Any] = {"queries": len(ids), "max_new_tokens": limit, "prompts": {}}
    found["per_query"] = {}
    for prompt in ("visible", "bottleneck"):
        if prompt == "bottleneck" and not model.card.num_bottleneck:
            continue
        written = write(model, contexts(model, queries, cut=prompt == "bottleneck"), limit)
        texts = [model.texts.text(ids) for ids in written]
        rouge = rouge_l(texts, references)
        found["per_query"][prompt] = dict(zip(ids, rouge, strict=True))
        shown = zip(queries, texts, references, strict=True)
        found["prompts"][prompt] = {
            "bleu_4": round(bleu_4(texts, references), 4),
            "rouge_l": round(sum(rouge) / len(rouge), 4),
            "words": round(sum(len(t.split()) for t in texts) / len(texts), 1),
            "examples": [{"query": q, "written": t, "reference": r[0]}
                         for q, t, r in list(shown)[:_EXAMPLES]],
        }  # fmt: skip
    return found


def contexts(model: PackedEncoder, queries: list[str], *, cut: bool) -> list[Sequence]:
    """`[X ; B]` of each query (without a bottleneck X and the end token), as in training."""
    bottleneck = model.card.num_bottleneck
    return [Sequence(ids, bottleneck, cut=cut) for ids in model.texts.contexts(queries)]


def _longest(model: PackedEncoder, references: list[list[str]]) -> int:
    """Tokens of the longest reference with its end, each cut at the model's `max_length`."""
    texts = [text for own in references for text in own]
    return 1 + max(len(model.texts.plain(text, model.card.max_length)) for text in texts)


def bleu_4(texts: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU-4 (sacrebleu's defaults), 0 to 100; a text may have any number of references."""
    most = max(len(own) for own in references)
    streams: Any = [[own[n] if n < len(own) else None for own in references] for n in range(most)]
    return float(sacrebleu.corpus_bleu(texts, streams).score)


def rouge_l(texts: list[str], references: list[list[str]]) -> list[float]:
    """ROUGE-L F1 of each text with its best reference, 0 to 100."""
    scorer = RougeScorer(["rougeL"])
    return [
        round(100 * scorer.score_multi(own, text)["rougeL"].fmeasure, 4)
        for text, own in zip(texts, references, strict=True)
    ]
