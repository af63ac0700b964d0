"""Export a checkpoint as a folder that transformers, sentence-transformers and servers load.

With a fixed number of bottleneck tokens the model is "append K tokens, take the last state,
normalise": the tokenizer appends them, so the folder needs no code of lbr-ds.

Before the folder appears under its name, the same texts go through the trainer's encoder, from the
weights as they were trained, and through sentence-transformers and onnxruntime, from the folder.
The vectors must agree. See README.md beside this file.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lbr_ds import runs
from lbr_ds.errors import CheckpointError, ConfigError, InternalError
from lbr_ds.exporting import check_export
from lbr_ds.exporting.card import model_card
from lbr_ds.exporting.folder import write_dimensions, write_sentence_transformers
from lbr_ds.exporting.layout import write_weights
from lbr_ds.exporting.onnx_graph import check_installed, prove_onnx, write_onnx
from lbr_ds.exporting.prove import TOLERANCE, proof_texts, prove
from lbr_ds.model.bottleneck import Card, keep_first
from lbr_ds.model.rope import write_legacy_rope
from lbr_ds.system.atomic import atomic_folder
from lbr_ds.system.progress import show_progress

__all__ = ["TOLERANCE", "export", "proof_texts", "prove"]

log = logging.getLogger(__name__)
_NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "made_from.json", "onnx", runs.MANIFEST)


def export(
    place: Path,
    out: Path,
    *,
    checkpoint: str = runs.BEST,
    causal_lm: bool = False,
    onnx: bool = False,
    int8: bool = False,
    bottleneck: int | None = None,
) -> dict[str, Any]:
    """Export a run's best checkpoint, or the given one, to a folder with a proof.

    Args:
        place: A run, a stage, a checkpoint or a model folder.
        out: A new folder.
        checkpoint: Of a run or a stage: best, last, or a step (`runs.model_folder`).
        causal_lm: Whether to write the generator with its language-model head, for further training
            and generation, instead of the base model that embedding servers load.
        onnx: Whether to write `onnx/` too.
        int8: Whether to write 8-bit weights in ONNX too; implies `onnx`.
        bottleneck: Append only this many bottleneck tokens, the first ones. `lbr-ds eval
            --bottleneck` measures what fewer tokens cost.

    Returns:
        The content of parity.json.

    Raises:
        ConfigError: `out` exists, or stock tools or ONNX cannot serve the model.
        CheckpointError: There is no checkpoint, a run has none but its backbone, its model is
            damaged or lacks the head asked for, or its vectors are not finite.
        InternalError: The exported vectors differ from the trainer's.
        EnvironmentProblem: ONNX is asked for and its packages are not installed.
    """
    if onnx or int8:
        check_installed()
    source, card = _find(place, checkpoint)
    _check_count(source, card, bottleneck)
    log.info("exporting %s", runs.choice(source, checkpoint))
    with show_progress() as progress, atomic_folder(out) as part:
        progress("export", 0, 3)
        needs = _write(source, part, card, bottleneck=bottleneck, causal_lm=causal_lm)
        progress("export", 1, 3)
        parity = {**_proved(source, part, out), "needs": needs}
        progress("export", 2, 3)
        if onnx or int8:
            write_onnx(part, int8=int8)
            parity["onnx"] = prove_onnx(part, parity["texts"], np.array(parity["vectors"]))
        (part / "parity.json").write_text(json.dumps(parity) + "\n", encoding="utf-8")
        shutil.copy(check_export.__file__, part / "check_export.py")
        (part / "README.md").write_text(
            model_card(place, part, Card.load(part), parity), encoding="utf-8"
        )
        runs.seal_folder(part, leave=("README.md",))  # the card is its user's to edit
        for path in part.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # weights are saved for their owner only
        progress("export", 3, 3)
    return parity


def _write(source: Path, part: Path, card: Card, *, bottleneck: int | None, causal_lm: bool) -> str:
    """Write weights, tokenizer and settings; return what a user must know before loading them."""
    shutil.copytree(source, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    write_weights(source, part, causal_lm=causal_lm)
    if bottleneck is not None:
        card = keep_first(part, bottleneck)
    needs = _needs(write_legacy_rope(part))
    write_sentence_transformers(part, card)
    write_dimensions(part)
    return needs


def _proved(source: Path, part: Path, out: Path) -> dict[str, Any]:
    """Return `prove`'s result. Raises InternalError when the vectors differ."""
    parity = prove(source, part)
    if not parity["largest_difference"] <= TOLERANCE:  # also when it is NaN
        raise InternalError(
            f"{out}: not exported, because the exported vectors differ from the trainer's by "
            f"{parity['largest_difference']:.2e} (limit {TOLERANCE:.0e}); this is a bug in "
            "lbr-ds for this backbone, please report it"
        )
    return parity


def _find(place: Path, checkpoint: str) -> tuple[Path, Card]:
    """Return the model folder to export and its card."""
    source = runs.model_folder(place, checkpoint)
    if source == place / "backbone":
        raise CheckpointError(
            f"{place} contains no trained checkpoint; to export the untrained backbone, "
            f"give {source}"
        )
    card = Card.load(source)
    if card.attention != "causal":
        raise ConfigError(
            f"model.attention={card.attention}: stock tools would load it as causal; "
            "score this baseline with `lbr-ds eval RUN`"
        )
    return source, card


def _check_count(source: Path, card: Card, bottleneck: int | None) -> None:
    """Raise ConfigError unless every text of the export has one number of bottleneck tokens."""
    if bottleneck is None and card.ratio is not None:
        raise ConfigError(
            f"{source}: bottleneck.ratio={card.ratio:g} gives each text its own number of tokens, "
            "which stock tools cannot do; export a fixed number with --bottleneck (1 to "
            f"{card.num_bottleneck}), or encode with lbr_ds.Encoder"
        )
    if bottleneck is not None and not 1 <= bottleneck <= card.num_bottleneck:
        raise ConfigError(
            f"--bottleneck {bottleneck}: {source} has {card.num_bottleneck} bottleneck tokens"
        )


def _needs(lacks: str) -> str:
    """Return what a user must know before loading the folder; "" for nothing."""
    if not lacks:
        return ""
    return (
        f"transformers 5 or newer: transformers 4 has no keys for this model's rotary positions "
        f"({lacks}), so it refuses the model or gives wrong vectors without an error"
    )
