"""Record -> the stage-1 sequence `[X ; B ; Y]` (paper, section 3.2).

Which text is X and which is Y: the table in config/objectives.py. X is encoded as it will be
embedded: a query after the record's `instruction`, a passage or prefix after its
`document_instruction`. Y is the bare text.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lbr_ds.batching.tokenizer import Sequence, TextTokenizer
from lbr_ds.config import OBJECTIVES
from lbr_ds.errors import DataError
from lbr_ds.records import Record


def draw(weights: dict[str, float], *key: int) -> str:
    """Draw the objective of one sample: a pure function of the weights and the key's numbers.

    Args:
        weights: the mixture, `stage1.objective`.
        key: in training (seed, epoch, step, lane), so that a resumed run draws the same.
    """
    names = sorted(weights)
    shares = np.array([weights[n] for n in names])
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    return names[generator.choice(len(names), p=shares / shares.sum())]


def generative_sequence(
    record: Record,
    objective: str,
    tokenizer: TextTokenizer,
    *,
    turn: int,
    max_target_length: int,
) -> Sequence:
    """Return the sequence of one record.

    Args:
        record: a pair or a plain passage.
        objective: a name of the table in config/objectives.py.
        tokenizer: the prepared one.
        turn: which of several positives is the answer, modulo their number.
        max_target_length: tokens of Y at most.

    Raises:
        DataError: the record lacks what the objective needs, or its instruction leaves no room for
            the query.
    """
    kind = OBJECTIVES[objective]
    passage = record.text or record.positives[turn % len(record.positives)]
    if not kind.bottleneck:
        question = record.instructed_query() if kind.x == "query" and record.query else ""
        return _plain(question, passage, tokenizer, max_target_length)
    if kind.x == "prefix":
        ids = tokenizer.plain(passage, tokenizer.max_length + max_target_length)
        before = tokenizer.instruction_ids(record.instructed_passage(""))
        half = min(len(ids) // 2, tokenizer.max_text - len(before))
        target = [*ids[half:], tokenizer.backend.eos_token_id][:max_target_length]
        context = tokenizer.wrap([*before, *ids[:half]])
        return Sequence(context, tokenizer.bottleneck_of(context), target, cut=kind.cut)
    if kind.x == "query" and record.text:
        raise DataError(
            f"record {record.id}: objective {objective} needs a query; plain passages serve "
            "ib_reconstruct, ib_continue, plain_sft and plain_lm"
        )
    source = record.instructed_query() if kind.x == "query" else record.instructed_passage(passage)
    target = tokenizer.target(passage, max_target_length)
    context = tokenizer.contexts([source])[0]
    return Sequence(context, tokenizer.bottleneck_of(context), target, cut=kind.cut)


def with_bag(sequence: Sequence, tokenizer: TextTokenizer) -> Sequence:
    """Add the bag of words that the end of X predicts (`stage1.bag_of_words`), if it has an X.

    The bag holds the distinct tokens of Y. Byte-level tokenizers encode rare characters, and in
    some scripts all, as several tokens that are bytes. Without their order these do not determine
    the characters, and hundreds of characters share them; so they are left out of the bag, unless Y
    has nothing else.
    """
    if len(sequence.context) <= 1:
        return sequence
    ids = set(sequence.target) - tokenizer.special_ids
    whole = {token for token in ids if not tokenizer.is_part(token)}
    return replace(sequence, bag=sorted(whole or ids))


def _plain(
    question: str, passage: str, tokenizer: TextTokenizer, max_target_length: int
) -> Sequence:
    """Return X and Y as one causal segment, with the end token between a question and its answer.

    Without a bottleneck what is between them is `bottleneck.separator`, as the tokenizer has it.
    """
    end = tokenizer.backend.eos_token_id
    target = tokenizer.target(passage, max_target_length)
    if question and not tokenizer.num_bottleneck:
        return Sequence(tokenizer.prompts([question])[0], 0, target, cut=False)
    ids = tokenizer.plain(question, tokenizer.max_length - 1) if question else []
    return Sequence([*ids, end], 0, target, cut=False)
