"""Load a model (a folder, a run, a checkpoint, a name) as one that mteb can evaluate."""

from __future__ import annotations

import inspect
import logging
import re
from typing import Any, cast

import mteb
import numpy as np
from datasets import Dataset
from mteb.models import ModelMeta, MTEBModels, SentenceTransformerEncoderWrapper
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from torch.utils.data import DataLoader

from lbr_ds.distributed import ALONE, World
from lbr_ds.encoder import Encoder
from lbr_ds.errors import ConfigError, LbrError
from lbr_ds.evaluation.across_ranks import encode_across_ranks
from lbr_ds.evaluation.baselines import BM25, check_ranks, resolve
from lbr_ds.evaluation.bm25 import Bm25
from lbr_ds.instructions import SIDES, Instructed, Side
from lbr_ds.model.complete import complete
from lbr_ds.model.stock import cannot_load
from lbr_ds.model.trust import no_pickles

log = logging.getLogger(__name__)


class OwnModel(AbsEncoder):
    """An lbr-ds model behind mteb's interface; each rank of `world` encodes its share of a call.

    Held-out tasks pass the texts after their own instructions (`instructed`). On official tasks a
    text gets the model's instruction for its prompt type by mteb's rule (`model_prompts`, as
    sentence-transformers' `prompts`).
    """

    def __init__(self, encoder: Encoder, world: World = ALONE) -> None:
        assert encoder.folder is not None
        self.encoder, self.world = encoder, world
        self.model_prompts = {side: encoder.instructions.only(side) or "" for side in SIDES}
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": f"lbr-ds/{encoder.folder.resolve().name}",
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

    def encode(
        self, inputs: Any, *, instructed: list[str] | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Encode batches of {"text": [...]} as mteb asks; returns (N, D) float32, normalised.

        instructed: the texts to encode in place of those of the batches.
        """
        prompt_type = kwargs.get("prompt_type")
        if instructed is None:
            name = self.get_prompt_name(kwargs["task_metadata"], prompt_type)
            prompt = (self.model_prompts or {}).get(name or "", "")
            instructed = [Instructed(prompt, t) for batch in inputs for t in batch["text"]]
        side: Side = "query" if prompt_type == PromptType.query else "document"

        def encode(part: list[str]) -> np.ndarray:
            return self.encoder.encode(part, side, progress=self.world.first)

        return encode_across_ranks(self.world, instructed, encode)

    def warn_of_several_instructions(self) -> None:
        """Log that official tasks are scored without an instruction where there are several."""
        instructions = self.encoder.instructions
        for side in instructions.unsettled():
            log.warning(
                "%s was trained with %d instructions for the %s side, so official tasks are scored "
                "without one; choose those of a source with --instructions-of",
                self.encoder.folder,
                len(instructions.distinct(side)),
                side,
            )


class SharedSentences(SentenceTransformerEncoderWrapper):
    """mteb's wrapper of a sentence-transformers model; each rank encodes its share of a call."""

    def __init__(self, model: Any, world: World) -> None:
        super().__init__(model)
        self.world = world

    def encode(self, inputs: Any, **kwargs: Any) -> np.ndarray:
        """Encode batches of {"text": [...]}; returns (N, D) float32."""
        texts = [text for batch in inputs for text in batch["text"]]
        alone = super().encode

        def encode(part: list[str]) -> np.ndarray:
            loader: Any = DataLoader(cast("Any", Dataset.from_dict({"text": part})), len(part))
            return np.asarray(alone(loader, **kwargs), np.float32)

        return encode_across_ranks(self.world, texts, encode)


def load_model(
    model: str,
    *,
    batch_tokens: int | None = None,
    batch_size: int = 64,
    trust_remote_code: bool = False,
    instructions_of: str = "",
    world: World = ALONE,
) -> MTEBModels:
    """Load the model that `model` names as one that mteb can evaluate.

    A folder, a run or a checkpoint is loaded by `Encoder`. So is a name, unless it is a short name
    of `baselines.py` or one of mteb's registry, which mteb's own loader then loads.

    Args:
        model: A folder, a run, a stage, a checkpoint, or a name.
        batch_tokens: As for `Encoder`.
        batch_size: As for `Encoder`.
        trust_remote_code: As for `Encoder`.
        instructions_of: As for `Encoder`; it matters on official tasks.
        world: Its ranks share the encoding; only for folders.

    Raises:
        ConfigError: As `Encoder`, and for a name with several ranks.
        CheckpointError: As `Encoder`.
        EnvironmentProblem: As `Encoder`.
    """
    check_ranks(model, world.size)
    encoder = Encoder(
        model,
        batch_tokens=batch_tokens,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        instructions_of=instructions_of,
    )
    if encoder.folder is None:
        return _by_name(resolve(model), trust_remote_code)
    encoder.load()
    if encoder.ours:
        return cast("MTEBModels", OwnModel(encoder, world))
    if world.size > 1:
        return SharedSentences(encoder.sentence_model, world)
    return SentenceTransformerEncoderWrapper(encoder.sentence_model)


def _by_name(name: str, trust_remote_code: bool) -> MTEBModels:
    """Use mteb's own loader where its registry knows the name: it has the model's prompts."""
    try:
        meta = mteb.get_model_meta(name)
    except KeyError:
        encoder = Encoder(name, trust_remote_code=trust_remote_code)
        return SentenceTransformerEncoderWrapper(encoder.sentence_model)
    if _runs_own_code(meta) and not trust_remote_code:
        raise ConfigError(
            f"{name} runs code from its own repository; allow it with trust_remote_code "
            "if you trust its authors"
        )
    if name == BM25:
        return cast("MTEBModels", Bm25(meta))
    try:
        with no_pickles(name), complete(name):
            return meta.load_model(**_trust(meta, trust_remote_code))
    except LbrError:
        raise
    except Exception as error:  # each loader of the registry raises its own kinds
        raise cannot_load(name, error) from error


def _trust(meta: ModelMeta, trust_remote_code: bool) -> dict[str, Any]:
    """Return the flag for a loader that passes it to sentence-transformers."""
    if meta.loader in (None, SentenceTransformerEncoderWrapper):
        return {"trust_remote_code": trust_remote_code}
    return {}


def _runs_own_code(meta: ModelMeta) -> bool:
    """Return whether mteb's loader turns trust_remote_code on, by argument or in its source."""
    if meta.loader_kwargs.get("trust_remote_code"):
        return True
    if meta.loader in (None, SentenceTransformerEncoderWrapper):
        return False
    try:
        source = inspect.getsource(inspect.unwrap(getattr(meta.loader, "func", meta.loader)))
    except (OSError, TypeError):
        return True
    return re.search(r"trust_remote_code\W+(\w+\W+)?True", source) is not None
