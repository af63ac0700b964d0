"""Score the answers that an lbr-ds model generates: BLEU-4, ROUGE-L (paper, Table 2) and chrF.

There are two prompts, both as in training:

| prompt       | the answer sees                  |                                       |
|--------------|----------------------------------|---------------------------------------|
| `visible`    | X and B (without B: X, its end)  | what the model knows                  |
| `bottleneck` | B alone                          | what passes through the bottleneck    |

Decoding is greedy. References are all relevant passages of the query; `text_metrics.py` has the
measures, 0 to 100, ROUGE-L as the mean over queries. A query whose references have no letter or
digit cannot be scored: it is counted under "unscored", with a warning.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr_ds.batching import Sequence
from lbr_ds.corpora.curate.segmentation import tokens
from lbr_ds.errors import ConfigError
from lbr_ds.evaluation.tasks import Judgements
from lbr_ds.evaluation.text_metrics import bleu_4, chrf, mean, rouge_l
from lbr_ds.instructions import bare

if TYPE_CHECKING:
    from lbr_ds.model.packed_encoder import PackedEncoder

log = logging.getLogger(__name__)
_EXAMPLES = 3


def score_generation(folder: Path, judged: Judgements) -> dict[str, Any]:
    """Write an answer to each query of `judged` and score it; folder: one with `lbr.json`.

    An answer is cut where the longest reference ends: the same for models of one tokenizer.
    Returns {"queries", "unscored", "max_new_tokens", "prompts": {prompt: {"bleu_4", "rouge_l",
    "chrf", "words": mean length, "examples": [{"query", "written", "reference"}]}}, "per_query":
    {prompt: {query id: rouge_l}}}. A score is None where no query can be scored.
    Raises ConfigError for an exported embedding model whose head was left out.
    """
    from lbr_ds.model.generate import write
    from lbr_ds.model.packed_encoder import PackedEncoder

    model = PackedEncoder(folder)
    if not model.card.head:
        raise ConfigError(
            f"--generation: {folder} has no language-model head, so it cannot generate text; use a "
            "checkpoint whose backbone has one or an export made with --causal-lm, or omit "
            "--generation"
        )
    ids, queries = list(judged.queries), list(judged.queries.values())
    references = [[bare(judged.documents[d]) for d in judged.relevant[i]] for i in ids]
    limit = _longest(model, references)
    unscored = sum(not any(map(tokens, own)) for own in references)
    if unscored:
        log.warning(
            "%d of %d queries are not scored: no reference of theirs has a letter or a digit",
            unscored,
            len(ids),
        )
    found: dict[str, Any] = {"queries": len(ids), "unscored": unscored, "max_new_tokens": limit}
    found |= {"prompts": {}, "per_query": {}}
    for prompt in ("visible", "bottleneck"):
        if prompt == "bottleneck" and not model.card.num_bottleneck:
            continue
        written = write(model, contexts(model, queries, cut=prompt == "bottleneck"), limit)
        texts = [model.tokenizer.text(ids) for ids in written]
        rouge = rouge_l(texts, references)
        found["per_query"][prompt] = dict(zip(ids, rouge, strict=True))
        shown = zip(queries, texts, references, strict=True)
        found["prompts"][prompt] = {
            "bleu_4": _rounded(bleu_4(texts, references)),
            "rouge_l": mean(rouge),
            "chrf": _rounded(chrf(texts, references)),
            "words": round(sum(len(tokens(t)) for t in texts) / len(texts), 1),
            "examples": [
                {"query": bare(q), "written": t, "reference": r[0]}
                for q, t, r in list(shown)[:_EXAMPLES]
            ],
        }
    return found


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 4)


def contexts(model: PackedEncoder, queries: list[str], *, cut: bool) -> list[Sequence]:
    """`[X ; B]` of each query (without a bottleneck X and its separator), as in training."""
    own = model.tokenizer
    return [Sequence(ids, own.bottleneck_of(ids), cut=cut) for ids in own.prompts(queries)]


def _longest(model: PackedEncoder, references: list[list[str]]) -> int:
    """Tokens of the longest reference with its end, each cut at the model's `max_length`."""
    texts = [text for own in references for text in own]
    return 1 + max(len(model.tokenizer.plain(text, model.card.max_length)) for text in texts)
