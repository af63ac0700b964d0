"""Two random spans of one passage as a pair, so that stage 2 trains on passages without queries.

Independent cropping (Izacard et al., Unsupervised Dense Information Retrieval with Contrastive
Learning, arXiv 2112.09118, section 3.1): both spans are drawn independently, so that they may
overlap. A span begins and ends at a word, and in scripts without spaces at a letter
(`segmentation.units`).

The spans are a pure function of the seed, the epoch and the record's id: they depend neither on
ranks, workers or resumes nor on a library's version, and every epoch draws others.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

import numpy as np

from lbr_ds.corpora.curate.segmentation import units
from lbr_ds.records import Record

Bounds = tuple[float, float]
_PURPOSE = 0x63726F70  # keeps this random stream apart from others of the same seed


def crop(record: Record, query: Bounds, passage: Bounds, *, seed: int, epoch: int) -> Record:
    """Return a pair made from a passage; a record that has a query is returned as it is.

    The pair keeps the id, group and document instruction, so that spans of one passage, and of
    passages of one group, are never negatives of each other.

    Args:
        record: a plain passage, or a pair.
        query: the shortest and the longest query, as shares of the passage's words.
        passage: the same for the positive.
        seed: the run's.
        epoch: of the record's lane.
    """
    if not record.text:
        return record
    places = units(record.text)
    draws = iter(_draws(record.id, seed, epoch))
    spans = []
    for low, high in (query, passage):
        share = low + (high - low) * next(draws)
        length = min(len(places), max(1, round(share * len(places))))
        first = int(next(draws) * (len(places) - length + 1))
        spans.append(record.text[places[first][0] : places[first + length - 1][1]])
    return replace(record, text="", query=spans[0], positives=[spans[1]])


def _draws(name: str, seed: int, epoch: int) -> list[float]:
    """Return four numbers in [0, 1).

    They are made from raw PCG64 output: numpy guarantees stable bit generators and SeedSequence,
    but not stable Generator methods (NEP 19).
    """
    digest = blake2b(name.encode(), digest_size=8).digest()
    words = [int.from_bytes(half, "big") for half in (digest[:4], digest[4:])]
    seeds = np.random.SeedSequence([seed, _PURPOSE, epoch, *words])
    raw = np.random.PCG64(seeds).random_raw(4)
    return [(number >> 11) / 2.0**53 for number in raw.tolist()]  # exact, and below 1
