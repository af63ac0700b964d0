"""The proof that an exported folder gives the trainer's own vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lbr_ds.errors import CheckpointError
from lbr_ds.instructions import SIDES, Instructed
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.fp32_arithmetic import use_fp32_arithmetic
from lbr_ds.model.packed_encoder import PackedEncoder
from lbr_ds.model.stock import load_sentences

_UNIT = 1e-3  # how far a vector's length may be from 1
TOLERANCE = 1e-5  # largest difference of a component, in fp32


_SENTENCE = (
    "the heart moves blood through vessels of many sizes and each of them carries oxygen salt "
    "sugar or heat to places where cells need it while veins return what was used "
)


def proof_texts(max_length: int) -> list[str]:
    """Return short, empty, odd and overlong texts, and some around the maximum length in tokens.

    Positions matter in a vector only where words differ, so the long ones repeat a sentence.
    """
    lengths = (1, 2, max_length // 2, max_length - 6, max_length - 2, max_length, 3 * max_length)
    words = (_SENTENCE * (1 + max_length // 10)).split()
    return [
        *(" ".join(words[: max(1, n)]) for n in lengths),
        "",
        "A",
        "naive cafe\nwith a line break",
        "white space around a text",
        "  white space around a text\n",  # check_export.py recognises who removes it
        "x" * (4 * max_length),
        "\u00e9\u03b2 12.5 mg/kg",
        "\u5fc3\u810f\u628a\u8840\u6db2\u9001\u5230\u5168\u8eab",  # Chinese
        "\u0627\u0644\u0642\u0644\u0628 \u064a\u0636\u062e \u0627\u0644\u062f\u0645",  # Arabic
    ]


def prove(source: Path, folder: Path) -> dict[str, Any]:
    """Encode the same texts by our encoder and by sentence-transformers, both in fp32.

    Ours reads the weights as they were trained, from `source`; theirs the exported folder.

    Also after each instruction of the folder's prompts, by `encode_query` and `encode_document`.
    One after the other, on weights as they are stored: the host holds them once.

    Returns:
        The content of `parity.json`: `texts`, the `vectors` that our encoder gave (what
        `check_export.py` compares other installations with), `largest_difference` of a component,
        the same `by_batch_size` (and by prompt), the `limit`, and the folder's `prompts`.
    """
    card = Card.load(folder)
    general = json.loads((folder / "config_sentence_transformers.json").read_text())
    prompts: dict[str, str] = general["prompts"]
    encoder = PackedEncoder(
        source, device="cpu", dtype="auto", bottleneck=card.num_bottleneck or None
    )
    use_fp32_arithmetic(encoder.model)
    texts = proof_texts(card.max_length)
    if not encoder.tokenizer.contexts_end:
        texts.remove("")  # stock tools have no token to read (`bottleneck.separator=none`)
    ours = encoder.encode(texts)
    by_prompt = {name: text for name, text in prompts.items() if text}
    instructed = {
        name: encoder.encode([Instructed(instruction, text) for text in texts])
        for name, instruction in by_prompt.items()
    }
    del encoder
    sound = np.abs(np.linalg.norm(ours, axis=1) - 1) <= _UNIT  # False for NaN
    if not sound.all():
        raise CheckpointError(
            f"{source}: the vector of {texts[int(sound.argmin())][:40]!r} is zero, not finite or "
            "not of length 1; "
            "the training diverged or the weights are damaged: export an earlier checkpoint"
        )
    stock = load_sentences(
        str(folder), device="cpu", model_kwargs={"dtype": "auto"}, local_files_only=True
    )
    use_fp32_arithmetic(stock)
    largest = {}
    for batch_size in (1, 3, len(texts)):  # alone, in mixed batches, all together
        theirs = stock.encode(texts, batch_size=batch_size, show_progress_bar=False)
        largest[str(batch_size)] = float(np.abs(theirs - ours).max())
    for name, vectors in instructed.items():
        side = stock.encode_document if name.startswith("document") else stock.encode_query
        theirs = side(texts, prompt_name=None if name in SIDES else name, show_progress_bar=False)
        largest[name] = float(np.abs(theirs - vectors).max())
    return {
        "prompts": prompts,
        "largest_difference": float(np.max(list(largest.values()))),  # NaN if any is NaN
        "by_batch_size": largest,
        "limit": TOLERANCE,
        "texts": texts,
        "vectors": [[round(float(x), 8) for x in vector] for vector in ours],
    }
