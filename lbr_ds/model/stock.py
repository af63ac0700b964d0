"""Load third-party models with sentence-transformers, complete or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr_ds.errors import CheckpointError, ConfigError, EnvironmentProblem, LbrError
from lbr_ds.model.complete import check_finite, check_positions, complete
from lbr_ds.model.tokens import ensure_padding, lacking
from lbr_ds.model.trust import SAFE, no_pickles, why_not

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer


def load_sentences(
    name: str, *, trust_remote_code: bool = False, **options: Any
) -> SentenceTransformer:
    """Load a folder or a hub name with sentence-transformers.

    Args:
        name: folder or hub name.
        trust_remote_code: whether code that the model brings may run.
        **options: for `SentenceTransformer`; `model_kwargs` are extended.

    Raises:
        CheckpointError: a tensor is missing, misshapen or not finite, or a folder cannot be loaded.
        ConfigError: the weights are pickles, or texts may be longer than the model has positions.
        EnvironmentProblem: a package is missing, or a name cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer  # slow to import

    options["model_kwargs"] = {**SAFE, **options.get("model_kwargs", {})}
    try:
        with no_pickles(name), complete(name):
            model = SentenceTransformer(name, trust_remote_code=trust_remote_code, **options)
    except LbrError:
        raise
    except Exception as error:  # the hub, safetensors and remote configs each raise their own
        raise cannot_load(name, error) from error
    check_finite(name, model.state_dict().items())  # of its other layers too
    ensure_padding(name, model.tokenizer)
    first: Any = model[0]
    config, longest = (
        getattr(getattr(first, "auto_model", None), "config", None),
        model.max_seq_length,
    )
    if config is not None and longest is not None:
        check_positions(name, config, {"max_seq_length": longest})
    return model


def load_cross_encoder(name: str, *, trust_remote_code: bool = False) -> CrossEncoder:
    """Load a folder or a hub name that gives a pair of texts one score. Raises as above.

    Raises:
        ConfigError: also, it gives a pair several numbers.
    """
    from sentence_transformers import CrossEncoder

    try:
        with no_pickles(name), complete(name):
            model = CrossEncoder(name, trust_remote_code=trust_remote_code, model_kwargs=dict(SAFE))
    except LbrError:
        raise
    except Exception as error:
        raise cannot_load(name, error) from error
    check_finite(name, model.state_dict().items())
    ensure_padding(name, model.tokenizer)
    if model.num_labels != 1:
        raise ConfigError(
            f"{name}: gives a pair of texts {model.num_labels} numbers; a teacher needs one score"
        )
    return model


def is_cross_encoder(name: str, *, trust_remote_code: bool = False) -> bool:
    """Return whether a folder or a hub name is a model that classifies sequences.

    Raises as `load_sentences` does.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        if (Path(name) / "modules.json").is_file():
            return False  # a sentence-transformers model need not be one of transformers
        raise cannot_load(name, error) from error
    kinds = config.architectures or ()
    return any(kind.endswith("ForSequenceClassification") for kind in kinds)


def cannot_load(name: str, error: Exception) -> LbrError:
    """Return an error with the name, the first line of the reason, and the cure."""
    if cure := lacking(Path(name)):
        return EnvironmentProblem(f"{name}: {cure}")
    if Path(name).is_dir():
        return CheckpointError(
            f"{name}: its files cannot be loaded as a model: {why_not(error)}; copy or save the "
            "model again"
        )
    return EnvironmentProblem(
        f"cannot load model {name!r}: {why_not(error)} (give a folder, a run, or a name; "
        "a name needs the network or a local copy)"
    )
