"""A checkpoint -> a folder that transformers, sentence-transformers, MTEB and servers load as is.

With a fixed number of bottleneck tokens the model is "append K tokens, take the last state,
normalise": the tokenizer appends them, so no code of ours is needed to use it.

Before the folder appears under its name, the same texts go through our own encoder and through
sentence-transformers, and the vectors must agree.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lbr_ds import check_export, runs
from lbr_ds.errors import CheckpointError, ConfigError
from lbr_ds.export.card import model_card
from lbr_ds.export.folder import write_sentence_transformers
from lbr_ds.export.prove import TOLERANCE, proof_texts, prove
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.rope import write_legacy_rope

__all__ = ["TOLERANCE", "export", "proof_texts", "prove"]


def export(place: Path, out: Path) -> dict[str, Any]:
    """Export a run's newest checkpoint (or the given one) to `out`; returns parity.json's content.

    Raises ConfigError when `out` exists or stock tools cannot serve the model, CheckpointError when
    there is no checkpoint, a run has none but its backbone, or the vectors differ or are not
    finite.
    """
    source = runs.model_folder(place)
    if source == place / "backbone":
        raise CheckpointError(f"{place} has trained nothing yet; export {source} if you mean that")
    card = Card.load(source)
    if card.attention != "causal":
        raise ConfigError(
            f"model.attention={card.attention}: stock tools would load it as causal; "
            "score this baseline with `lbr-ds eval RUN`"
        )
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is not empty; give a new folder")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    (part / "made_from.json").unlink(missing_ok=True)
    needs = _needs(write_legacy_rope(part))
    write_sentence_transformers(part, card)
    parity = prove(part)
    if not parity["largest_difference"] <= TOLERANCE:  # also when it is NaN
        raise CheckpointError(
            f"{part}: vectors differ from the trainer's own by {parity['largest_difference']:.2e} "
            f"(limit {TOLERANCE:.0e}); this is a fault of lbr-ds with this backbone, do not use it"
        )
    parity["needs"] = needs
    (part / "parity.json").write_text(json.dumps(parity) + "\n", encoding="utf-8")
    shutil.copy(check_export.__file__, part / "check_export.py")
    (part / "README.md").write_text(model_card(place, part, card, parity), encoding="utf-8")
    runs.seal_folder(part, leave=("README.md",))  # the card is its user's to edit
    for path in part.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # weights are saved for their owner only
    if out.exists():
        out.rmdir()
    part.rename(out)
    return parity


def _needs(lacks: str) -> str:
    """What a user of the folder must know before loading it; empty when there is nothing."""
    if not lacks:
        return ""
    return (
        f"transformers 5 or newer: transformers 4 has no keys for this model's rotary positions "
        f"({lacks}) and would give wrong vectors without an error"
    )
