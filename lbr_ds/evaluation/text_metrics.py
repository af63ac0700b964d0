"""BLEU-4, chrF and ROUGE-L of generated texts, 0 to 100, in any script.

| measure | of                        | by                                                      |
|---------|---------------------------|---------------------------------------------------------|
| BLEU-4  | the whole set             | sacrebleu, over `segmentation.spaced`                   |
| chrF    | the whole set             | sacrebleu: letters alone, so alike in any script        |
| ROUGE-L | each text, best reference | longest common subsequence of `segmentation.tokens`  |

Of English text BLEU-4 is sacrebleu's default and ROUGE-L that of Google's rouge-score (F1). Chinese
is cut as by sacrebleu's tokenizer `zh`, which so serves Japanese, Thai and mixed text too. A text
that has no letter or digit in any reference cannot be scored: it has no ROUGE-L, and does not count
in the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sacrebleu

from lbr_ds.corpora.curate.segmentation import spaced, tokens


def bleu_4(texts: list[str], references: list[list[str]]) -> float | None:
    """Corpus BLEU-4; a text may have any number of references. None where nothing can be scored.

    Orders that no text is long enough for are left out, so that equal short texts have 100.
    """
    texts, references = _scored(texts, references)
    if not texts:
        return None
    streams: Any = _streams([[spaced(text) for text in own] for own in references])
    made = sacrebleu.corpus_bleu(list(map(spaced, texts)), streams, use_effective_order=True)
    return float(made.score)


def chrf(texts: list[str], references: list[list[str]]) -> float | None:
    """Corpus chrF (runs of up to 6 characters, recall counted twice); None as of `bleu_4`."""
    texts, references = _scored(texts, references)
    if not texts:
        return None
    streams: Any = _streams(references, fill=True)
    return float(sacrebleu.corpus_chrf(texts, streams).score)


def rouge_l(texts: list[str], references: list[list[str]]) -> list[float | None]:
    """ROUGE-L F1 of each text with its best reference; None where no reference has a token."""
    found: list[float | None] = []
    for text, own in zip(texts, references, strict=True):
        written = tokens(text)
        scores = [_f1(written, wanted) for reference in own if (wanted := tokens(reference))]
        found.append(round(100 * max(scores), 4) if scores else None)
    return found


def mean(scores: Sequence[float | None]) -> float | None:
    """Return the mean of the scores that are not None."""
    known = [score for score in scores if score is not None]
    return round(sum(known) / len(known), 4) if known else None


def _scored(texts: list[str], references: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Return the texts with their references that have a token; drop texts without one."""
    kept = [
        (text, scored)
        for text, own in zip(texts, references, strict=True)
        if (scored := [reference for reference in own if tokens(reference)])
    ]
    return [text for text, _ in kept], [own for _, own in kept]


def _streams(references: list[list[str]], fill: bool = False) -> list[list[str | None]]:
    """Transpose references by text to lists with one for each text, as sacrebleu takes them.

    Where a text has fewer references than another there is None, or with `fill` its first again:
    chrF takes no None, and counts the best reference.
    """
    most = max(map(len, references))
    return [
        [own[n] if n < len(own) else own[0] if fill else None for own in references]
        for n in range(most)
    ]


def _f1(one: list[str], other: list[str]) -> float:
    """Harmonic mean of the shares of both that their longest common subsequence makes up."""
    row = [0] * (len(other) + 1)  # row[j]: the longest of the tokens so far and other[:j]
    for token in one:
        before = 0
        for place, wanted in enumerate(other, 1):
            kept = row[place]
            row[place] = before + 1 if token == wanted else max(kept, row[place - 1])
            before = kept
    return 2 * row[-1] / (len(one) + len(other))
