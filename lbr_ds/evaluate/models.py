"""MODEL (a folder, a run, a checkpoint, a name) -> an encoder that mteb can use."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path
from typing import Any, cast

import mteb
import numpy as np
from datasets import Dataset
from mteb.models import ModelMeta, MTEBModels, SentenceTransformerEncoderWrapper
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from torch.utils.data import DataLoader

from lbr_ds import runs
from lbr_ds.distributed import ALONE, World, shared
from lbr_ds.errors import ConfigError, LbrError
from lbr_ds.evaluate.baselines import BM25, check_ranks, resolve
from lbr_ds.evaluate.bm25 import Bm25
from lbr_ds.instructions import SIDES, Instructed, Instructions
from lbr_ds.model.bottleneck import CARD
from lbr_ds.model.complete import complete
from lbr_ds.model.sentences import Exported
from lbr_ds.model.stock import cannot_load, load_sentences
from lbr_ds.model.trust import no_pickles

log = logging.getLogger(__name__)


class Trained:
    """What the two forms of a model of ours share: the instructions that it was trained with.

    Their `encode` takes `instructed`: the texts to encode in place of the inputs', each after its
    own instruction. Left out, as on official tasks, a text gets the model's instruction for its
    prompt type by mteb's rule (`model_prompts`, as sentence-transformers' `prompts`).
    """

    name: str
    instructions: Instructions
    model_prompts: dict[str, str] | None

    def learn_instructions(self, folder: Path, source: str) -> None:
        """Read those of the model folder. Raises DataError for a `source` that has none."""
        self.name, self.instructions = str(folder), Instructions.load(folder)
        if source:
            self.instructions = self.instructions.of_source(source, self.name)
        self.model_prompts = {side: self.instructions.only(side) or "" for side in SIDES}

    def say_what_is_unsettled(self) -> None:
        """One line when official tasks are asked without an instruction since there are several."""
        for side in self.instructions.unsettled():
            log.warning(
                "%s was trained with %d instructions for the %s side, so official tasks are scored "
                "without one; choose those of a source with --instructions-of",
                self.name,
                len(self.instructions.distinct(side)),
                side,
            )


class PackedModel(AbsEncoder, Trained):
    """A checkpoint's `model/` folder behind mteb's interface: the trainer's own forward code.

    With several ranks in `world` each encodes its share of every call.
    """

    def __init__(
        self,
        folder: Path,
        batch_tokens: int | None = None,
        world: World = ALONE,
        trust_remote_code: bool = False,
        instructions_of: str = "",
    ) -> None:
        from lbr_ds.model.encoder import PackedEncoder

        self.model = PackedEncoder(folder, trust_remote_code=trust_remote_code)
        self.learn_instructions(folder, instructions_of)
        self.batch_tokens, self.world = batch_tokens, world
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": f"lbr-ds/{folder.resolve().name}",
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

    def encode(
        self, inputs: Any, *, instructed: list[str] | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Batches of {"text": [...]} -> (N, D) float32, unit length."""
        if instructed is None:
            name = self.get_prompt_name(kwargs["task_metadata"], kwargs.get("prompt_type"))
            prompt = (self.model_prompts or {}).get(name or "", "")
            instructed = [Instructed(prompt, t) for batch in inputs for t in batch["text"]]
        progress = bool(kwargs.get("show_progress_bar", False))

        def encode(part: list[str]) -> np.ndarray:
            return self.model.encode(part, batch_tokens=self.batch_tokens, progress=progress)

        return shared(self.world, instructed, encode)


class SharedSentences(SentenceTransformerEncoderWrapper):
    """mteb's wrapper of a sentence-transformers model; each rank encodes its share of a call."""

    def __init__(self, model: Any, world: World) -> None:
        super().__init__(model)
        self.world = world

    def encode(self, inputs: Any, **kwargs: Any) -> np.ndarray:
        """Batches of {"text": [...]} -> (N, D) float32."""
        texts = [text for batch in inputs for text in batch["text"]]
        alone = super().encode

        def encode(part: list[str]) -> np.ndarray:
            loader: Any = DataLoader(cast("Any", Dataset.from_dict({"text": part})), len(part))
            return np.asarray(alone(loader, **kwargs), np.float32)

        return shared(self.world, texts, encode)


class ExportedModel(SharedSentences, Trained):
    """An exported folder of ours by way of sentence-transformers."""

    def __init__(self, model: Any, folder: Path, world: World, instructions_of: str = "") -> None:
        super().__init__(model, world)
        self.learn_instructions(folder, instructions_of)
        self.exported = Exported(folder, model)

    def encode(
        self, inputs: Any, *, instructed: list[str] | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Batches of {"text": [...]} -> (N, D) float32."""
        if instructed is None:
            return super().encode(inputs, **kwargs)
        options = {k: kwargs[k] for k in ("batch_size", "show_progress_bar") if k in kwargs}

        def encode(part: list[str]) -> np.ndarray:
            return self.exported.encode(part, **options)

        return shared(self.world, instructed, encode)


OWN = (PackedModel, ExportedModel)


def load_model(
    model: str,
    *,
    batch_tokens: int | None = None,
    trust_remote_code: bool = False,
    instructions_of: str = "",
    world: World = ALONE,
) -> MTEBModels:
    """The encoder that `model` stands for.

    - a folder with `modules.json`, or a plain Hugging Face folder: sentence-transformers;
    - a run, one of its stages, or a checkpoint: its newest model (see `runs`), our own encoder;
    - `bm25`, or another short name of `baselines.py`;
    - anything else: a name of mteb's registry, or one that sentence-transformers can fetch.
    instructions_of: the source whose instructions a model of ours uses on official tasks; without
    it they get none where its sources have different ones. The ranks of `world` share the work of
    the first two. Raises ConfigError for the others then, for a folder that holds no model and for
    a model that would run code of its own without `trust_remote_code`; CheckpointError for a
    damaged or incomplete one; EnvironmentProblem when it cannot be loaded.
    """
    check_ranks(model, world.size)
    found = runs.find_model(model)
    if found.folder is None:
        return _by_name(resolve(model), trust_remote_code)
    if found.packed:
        encoder = PackedModel(found.folder, batch_tokens, world, trust_remote_code, instructions_of)
        return cast("MTEBModels", encoder)
    return _sentence_transformer(str(found.folder), trust_remote_code, world, instructions_of)


def is_ours(model: str) -> bool:
    """Whether `load_model` would give a model that was trained here, with its instructions."""
    return runs.find_model(model).ours


def _sentence_transformer(
    name: str, trust_remote_code: bool, world: World = ALONE, instructions_of: str = ""
) -> SentenceTransformerEncoderWrapper:
    """A folder or a hub name by way of sentence-transformers."""
    model = load_sentences(name, trust_remote_code=trust_remote_code)
    if (Path(name) / CARD).is_file():
        return ExportedModel(model, Path(name), world, instructions_of)
    if world.size > 1:
        return SharedSentences(model, world)
    return SentenceTransformerEncoderWrapper(model)


def _by_name(name: str, trust_remote_code: bool) -> MTEBModels:
    """mteb's own loader where its registry knows the name: it has the model's prompts."""
    try:
        meta = mteb.get_model_meta(name)
    except KeyError:
        return _sentence_transformer(name, trust_remote_code)
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
    """The flag for a loader that hands it on to sentence-transformers; others have their own."""
    if meta.loader in (None, SentenceTransformerEncoderWrapper):
        return {"trust_remote_code": trust_remote_code}
    return {}


def _runs_own_code(meta: ModelMeta) -> bool:
    """Whether mteb's loader for this model turns trust_remote_code on, by argument or in source."""
    if meta.loader_kwargs.get("trust_remote_code"):
        return True
    if meta.loader in (None, SentenceTransformerEncoderWrapper):
        return False
    try:
        source = inspect.getsource(inspect.unwrap(getattr(meta.loader, "func", meta.loader)))
    except (OSError, TypeError):
        return True
    return re.search(r"trust_remote_code\W+(\w+\W+)?True", source) is not None
