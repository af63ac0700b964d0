"""A recipe's `model` -> the backbone that it names, untouched and complete, with its tokenizer.

What is wrong with a backbone is found here, before anything is trained: see `complete.py`.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from lbr_ds.config import ModelConfig
from lbr_ds.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem
from lbr_ds.model.complete import check_positions, complete, fit, report_prefixes, report_unused
from lbr_ds.model.files import Stored
from lbr_ds.model.tokens import ensure_end, open_tokenizer
from lbr_ds.model.trust import SAFE, no_pickles, why_not
from lbr_ds.system.locate import locate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backbone:
    """An untouched backbone.

    Attributes:
        module: with its weights, or on the meta device where `stored` has them.
        tokenizer: a fast one, with an end token.
        stored: the weights' files, which hold every parameter under its name; None: loaded.
        head: False where there was no language-model head, so that the embeddings stand for it.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stored: Stored | None
    head: bool


def open_backbone(model: ModelConfig) -> Backbone:
    """Open the backbone that `model` names; a `.gguf` file is dequantised to fp32.

    Where its files hold what it needs name by name, the weights stay in them: no large backbone is
    in memory as a whole. Raises ConfigError when it cannot be loaded or is not complete.
    """
    what = f"model.backbone={model.backbone!r}"
    name, options = _place(model)
    _check_files(what, Path(name), options)
    try:
        with no_pickles(what):
            tokenizer = open_tokenizer(what, name, **options)
            found: tuple[PreTrainedModel, Stored | None, bool] | None = None
            if "gguf_file" not in options and not model.trust_remote_code:
                found = _without_weights(what, name, model.revision)
            if found is None:
                found = _loaded(what, name, options), None, True
    except (ConfigError, DataError, EnvironmentProblem):
        raise
    except CheckpointError as error:
        raise ConfigError(str(error) if what in str(error) else f"{what}: {error}") from None
    except Exception as error:  # transformers, safetensors and remote code raise many kinds
        raise ConfigError(f"{what} cannot be loaded: {why_not(error)}") from None
    module, stored, head = found
    check_positions(what, module.config, {"model.max_length": model.max_length})
    ensure_end(what, tokenizer, module)
    return Backbone(module, tokenizer, stored, head)


def open_generator(
    what: str, model: ModelConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a causal language model to generate text with, and its tokenizer.

    Args:
        what: the recipe's key and value, for messages.
        model: names it, as for `open_backbone`.

    Raises:
        ConfigError: it cannot be loaded, or is not complete.
    """
    name, options = _place(model)
    _check_files(what, Path(name), options)
    try:
        with no_pickles(what):
            tokenizer = open_tokenizer(what, name, **options)
            return _loaded(what, name, options), tokenizer
    except (ConfigError, DataError, EnvironmentProblem):
        raise
    except Exception as error:  # transformers, safetensors and remote code raise many kinds
        raise ConfigError(f"{what} cannot be loaded: {why_not(error)}") from None


def _place(model: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Return the name or folder for `from_pretrained`, and its options."""
    name: str = model.backbone
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if name.startswith("wheel:"):
        name = str(locate(name))
    if name.endswith(".gguf"):
        return str(Path(name).parent), {**options, "gguf_file": Path(name).name}
    return name, {**options, "revision": model.revision}


def _check_files(what: str, folder: Path, options: dict[str, Any]) -> None:
    """Raise ConfigError for weights that are pickles, or adapters instead of a model."""
    if not folder.is_dir() or "gguf_file" in options:
        return
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{what} holds adapters (adapter_config.json); merge them into their model first "
            "(peft: merge_and_unload) and give the merged folder"
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{what} holds no .safetensors file; pickled weights (.bin, .pt) could run code when "
            "they are opened, so convert them where you trust them"
        )


def _loaded(what: str, name: str, options: dict[str, Any]) -> PreTrainedModel:
    """Return the module with its weights in memory, loaded by transformers."""
    weights = {} if "gguf_file" in options else SAFE
    with complete(what):
        module = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **options, **weights)
    # A dequantised GGUF still says that it is quantised, and would refuse to be saved.
    if "gguf_file" in options:
        del module.config.quantization_config, module.hf_quantizer
    return module


def _without_weights(
    what: str, name: str, revision: str | None
) -> tuple[PreTrainedModel, Stored | None, bool] | None:
    """Return (module on the meta device, files, head); None where names or shapes differ."""
    folder = Path(name)
    if not folder.is_dir():
        patterns = ["*.json", "*.safetensors"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    config, stored = AutoConfig.from_pretrained(folder, trust_remote_code=False), Stored(folder)
    if config.dtype is None:  # transformers then takes the weights' own
        return None
    module, head = _on_meta(config), True
    found = fit(_names(module), stored.names())
    tied = config.tie_word_embeddings
    missing = {own for own, names in _tied(module).items() if not found.stored.keys() & names}
    if tied and _differ(module, found.stored, stored):
        log.warning(
            "%s: config.json ties the head to the embeddings, but the files hold a head of its "
            "own, which is used",
            what,
        )
        config.tie_word_embeddings = False
    elif not tied and missing == _head(module):
        log.warning(
            "%s: holds no %s (an embedding model?): stage 2 can train it, stage 1 cannot",
            what,
            " and ".join(sorted(missing)),
        )
        config.tie_word_embeddings, head = True, False
    if config.tie_word_embeddings != tied:
        module = _on_meta(config)
    for own, names in _tied(module).items():
        for name in (name for name in reversed(names) if name in found.stored):
            stored.rename({own: found.stored[name]})
    same = all(n in stored and stored.shape(n) == p.shape for n, p in module.named_parameters())
    if not same or module.state_dict(keep_vars=True).keys() - _names(module):
        return None
    report_prefixes(what, found.prefixes)
    report_unused(what, _used_nowhere(found.unexpected, module))
    if (folder / "generation_config.json").is_file():
        module.generation_config = GenerationConfig.from_pretrained(folder)
    return module, stored, head


def _on_meta(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights():
        module: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=config.dtype, trust_remote_code=False
        )
    module.tie_weights()
    return module


def _names(module: PreTrainedModel) -> dict[str, None]:
    """Return the names of all parameters, each name of a tied one."""
    return dict.fromkeys(name for name, _ in module.named_parameters(remove_duplicate=False))


def _tied(module: PreTrainedModel) -> dict[str, list[str]]:
    """Return {first name of each parameter: all of its names, that one first}."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {own[0]: own for own in names.values()}


def _head(module: PreTrainedModel) -> set[str]:
    """Return the names of the language-model head's parameters."""
    head: Any = module.get_output_embeddings()
    own = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    return {name for name, parameter in module.named_parameters() if id(parameter) in own}


def _differ(module: PreTrainedModel, found: dict[str, str], stored: Stored) -> bool:
    """Return whether the files hold a tied parameter under two names with two values."""
    for names in _tied(module).values():
        there = [stored.read(found[name]) for name in names if name in found]
        if any(not torch.equal(there[0], other) for other in there[1:]):
            return True
    return False


def _used_nowhere(names: list[str], module: PreTrainedModel) -> list[str]:
    """Return `names` without those that transformers ignores, such as computed tables."""
    ignored = [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    ignored += list(module._keys_to_ignore_on_load_unexpected or ())
    return [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]
