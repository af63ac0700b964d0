"""Record -> the stage-1 sequence (paper, section 3.2): which text is X, which is Y.

| objective     | X       | Y        | Y sees          |
|---------------|---------|----------|-----------------|
| `sft`         | query   | positive | B, earlier Y    |
| `reconstruct` | passage | passage  | B, earlier Y    |
| `continue`    | prefix  | suffix   | B, earlier Y    |
| `uncut`       | query   | positive | X, B, earlier Y |
| `gl`          | query   | positive | X, earlier Y    |
| `pt`          |         | passage  | earlier Y       |

X is encoded as it will be embedded: a query after the record's `instruction`, a passage or prefix
after its `document_instruction`. Y is the bare text.

`gl` and `pt` are the paper's baselines (standard SFT and PT): plain causal learning, no bottleneck;
under `gl` a plain passage is all Y, as under `pt`. `uncut` is a control of ours: the tokens of
`sft` without its cut.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lbr_ds.batching.encode import Sequence, TextEncoder
from lbr_ds.errors import DataError
from lbr_ds.records import Record


def draw(weights: dict[str, float], *key: int) -> str:
    """The objective of one sample: a pure function of the weights and the key's numbers."""
    names = sorted(weights)
    shares = np.array([weights[n] for n in names])
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    return names[generator.choice(len(names), p=shares / shares.sum())]


def generative_sequence(
    record: Record, objective: str, encoder: TextEncoder, *, turn: int, max_target_length: int
) -> Sequence:
    """The sequence of one record. turn: which of several positives, counted round.

    Raises DataError when the record lacks what the objective needs, or its instruction leaves no
    room for the query.
    """
    passage = record.text or record.positives[turn % len(record.positives)]
    if objective in ("gl", "pt"):
        question = record.asked() if objective == "gl" and record.query else ""
        return _plain(question, passage, encoder, max_target_length)
    bottleneck = encoder.num_bottleneck
    if objective in ("sft", "uncut"):
        if record.text:
            raise DataError(
                f"record {record.id}: objective {objective} needs a query; plain passages serve "
                "reconstruct, continue and gl"
            )
        context = encoder.contexts([record.asked()])[0]
        target = encoder.target(passage, max_target_length)
        return Sequence(context, bottleneck, target, cut=objective == "sft")
    if objective == "reconstruct":
        context = encoder.contexts([record.told(passage)])[0]
        return Sequence(context, bottleneck, encoder.target(passage, max_target_length))
    ids = encoder.plain(passage, encoder.max_length + max_target_length)
    before = encoder.instruction_ids(record.told(""))
    half = min(len(ids) // 2, encoder.max_length - bottleneck - len(before))
    target = [*ids[half:], encoder.tokenizer.eos_token_id][:max_target_length]
    return Sequence(encoder.wrap([*before, *ids[:half]]), bottleneck, target)


def with_bag(sequence: Sequence, encoder: TextEncoder) -> Sequence:
    """Add the words of Y that the end of X is to predict (`stage1.bag_of_words`), if it has an X.

    The bag holds the distinct tokens of Y. Byte-level tokenizers write rare characters, and in some
    scripts all, as several tokens that are bytes. Without their order such parts do not tell which
    characters they make up, and hundreds of characters share them; so they are left out of the bag,
    unless Y has nothing else.
    """
    if len(sequence.context) <= 1:
        return sequence
    ids = set(sequence.target) - encoder.special_ids
    whole = {token for token in ids if not encoder.is_part(token)}
    return replace(sequence, bag=sorted(whole or ids))


def _plain(question: str, passage: str, encoder: TextEncoder, max_target_length: int) -> Sequence:
    """X and Y under one causal segment; the end token stands between a question and its answer.

    Without a bottleneck that is how the tokenizer ends every text, so X is read as it is learnt.
    """
    end = encoder.tokenizer.eos_token_id
    target = encoder.target(passage, max_target_length)
    if question and not encoder.num_bottleneck:
        return Sequence(encoder.contexts([question])[0], 0, target, cut=False)
    ids = encoder.plain(question, encoder.max_length - 1) if question else []
    return Sequence([*ids, end], 0, target, cut=False)
