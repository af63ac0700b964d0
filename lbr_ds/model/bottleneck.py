"""Prepare a backbone: a pretrained causal LM with K bottleneck tokens, in a folder.

Done once, before any sharding: adding tokens under ZeRO-3 loses rows (transformers #41959), and
untrained reserved rows are near zero and then dominate gradient clipping (OpenRLHF #648).

1. K special tokens join the tokenizer, whose post-processor now appends them to every text, so that
   truncation leaves room for them and any stock server builds `[X ; B]` by itself.
2. Their embedding rows (and head rows, where the head is not tied) start at the mean of the real
   rows plus noise of a tenth of the rows' own spread: near the distribution, yet distinct.
   Spare rows of a padded vocabulary are used before the table is made longer.
3. The chat template is dropped: sentence-transformers 6 would feed texts through it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lbr_ds import runs
from lbr_ds.config import BottleneckConfig, ModelConfig
from lbr_ds.errors import CheckpointError, ConfigError, DataError
from lbr_ds.model import made_from
from lbr_ds.model.backbone import open_backbone
from lbr_ds.model.chat import Frame, chat_frame
from lbr_ds.model.complete import not_finite
from lbr_ds.model.files import Stored, in_files, save_files, save_index
from lbr_ds.model.rope import write_legacy_rope
from lbr_ds.model.tokens import open_tokenizer
from lbr_ds.system.atomic import atomic_folder, try_recover
from lbr_ds.system.failures import reading

log = logging.getLogger(__name__)
CARD = "lbr.json"
_NEVER = -1e4  # a piece's log probability: any other way to write the text is likelier
_ROUND_TO = 64  # new embedding tables get a multiple of this many rows, for fast kernels

transformers_logging.disable_progress_bar()  # else every rank shows a bar for each tensor


@dataclass(frozen=True)
class Card:
    """Content of `lbr.json`: how the model of a folder turns a text into a vector.

    pool_instruction: whether the mean includes an instruction's states; only mean pooling asks.
    """

    num_bottleneck: int
    max_length: int
    pooling: str
    attention: str
    pool_instruction: bool = True
    head: bool = True  # False: no language-model head of its own, only encoding is possible
    ratio: float | None = None  # tokens of text for each bottleneck token; None: all have K
    chat: Frame | None = None  # ids around X in stage 1 (`bottleneck.separator=chat`)

    def save(self, folder: Path) -> None:
        """Write the card into a model folder."""
        (folder / CARD).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Card:
        """Read the card of a folder. Raises DataError when it has none."""
        path = folder / CARD
        if not path.is_file():
            raise DataError(f"{folder} has no {CARD}: not a folder made by lbr-ds")
        with reading(path, "the card of the model", CheckpointError, "save or copy it again"):
            return cls(**json.loads(path.read_text()))


def bottleneck_token(index: int) -> str:
    """Return the text of bottleneck token `index`."""
    return f"<|bottleneck_{index}|>"


def bottleneck_ids(folder: Path) -> list[int]:
    """Return the ids of a prepared backbone's bottleneck tokens.

    Random weights that are only measured have no tokenizer; there the first ids stand for them.
    """
    count = Card.load(folder).num_bottleneck
    if not (folder / "tokenizer.json").is_file():
        return list(range(count))
    tokenizer: Any = load_tokenizer(folder)
    return [tokenizer.convert_tokens_to_ids(bottleneck_token(i)) for i in range(count)]


def prepare_backbone(
    model: ModelConfig, bottleneck: BottleneckConfig, folder: Path, seed: int
) -> None:
    """Write the prepared backbone to `folder`, unless one with equal content exists there.

    A backbone whose files have changed since then is prepared again.

    Raises:
        ConfigError: It cannot be loaded, or it is not complete.
    """
    wanted = {**model.model_dump(), **bottleneck.model_dump(), "seed": seed}
    if made_from.is_up_to_date(folder, model, wanted):
        try_recover(folder)
        return
    opened = open_backbone(model)
    backbone, tokenizer, stored = opened.module, opened.tokenizer, opened.stored
    if model.num_layers is not None:
        _keep_layers(backbone, model.num_layers)
    new = _add_tokens(backbone, tokenizer, bottleneck.count, seed)
    chat = chat_frame(model, tokenizer) if bottleneck.separator == "chat" else None
    _append_to_texts(tokenizer, bottleneck)
    with atomic_folder(folder, check=_check_ours) as part:
        if stored is None:
            for index, table in enumerate(_tables(backbone)):
                new.fill(table.data, index)
            backbone.save_pretrained(part)
        else:
            backbone.save_pretrained(part, state_dict={})  # all but the weights
            _copy(f"model.backbone={model.backbone!r}", stored, backbone, new, part)
        write_legacy_rope(part)
        save_tokenizer(tokenizer, part)
        head = opened.head and _had_head(Path(model.backbone))
        Card(
            bottleneck.count,
            model.max_length,
            model.pooling,
            model.attention,
            model.pool_instruction,
            head,
            bottleneck.ratio,
            chat,
        ).save(part)
        made_from.save_lineage(model, bottleneck, part)
        (part / made_from.NAME).write_text(json.dumps(wanted, indent=2) + "\n")
        runs.seal_folder(part)


def _check_ours(folder: Path) -> None:
    """Raise ConfigError for a folder that is not empty and was not made by `prepare_backbone`."""
    ours = any((folder / name).is_file() for name in (made_from.NAME, CARD))
    if not ours and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} was not made by lbr-ds; move it away, or give another run=...")


def _copy(
    what: str, stored: Stored, backbone: PreTrainedModel, new: _NewRows, folder: Path
) -> None:
    """Write the weights that the module lacks, a file at a time, its tables with the new rows."""
    wanted = dict(backbone.named_parameters())
    tables = [id(table) for table in _tables(backbone)]

    def read(name: str) -> Tensor:
        parameter, tensor = wanted[name], stored.read(name).to(wanted[name].dtype)
        if fault := not_finite(name, tensor):
            raise ConfigError(f"{what}: {fault}; take an undamaged copy of the backbone")
        if id(parameter) not in tables:
            return tensor
        grown = tensor.new_empty(parameter.shape)
        grown[: len(tensor)] = tensor
        new.fill(grown, tables.index(id(parameter)))
        return grown

    files = in_files({name: p.numel() * p.itemsize for name, p in wanted.items()})
    save_files(files, read, folder)
    save_index(files, folder)


def _had_head(folder: Path) -> bool:
    """Return whether a backbone has a language-model head; an export for embedding may lack one."""
    return not (folder / CARD).is_file() or Card.load(folder).head


def _keep_layers(backbone: PreTrainedModel, count: int) -> None:
    """Drop all decoder layers but the first `count`."""
    body: Any = backbone.base_model
    name = "layers" if hasattr(body, "layers") else "h"  # GPT-2 and its kin
    layers = getattr(body, name, None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"model.num_layers={count} is not supported for {type(body).__name__}, whose list of "
            "decoder layers was not found; remove model.num_layers"
        )
    if count > len(layers):
        raise ConfigError(f"model.num_layers={count}, but the backbone has {len(layers)}")
    setattr(body, name, layers[:count])
    backbone.config.num_hidden_layers = count
    if getattr(backbone.config, "layer_types", None):
        backbone.config.layer_types = backbone.config.layer_types[:count]


@dataclass(frozen=True)
class _NewRows:
    """The rows of tables that were added: `ids` of the K tokens, `num_rows` as there were before.

    num_real: of those, rows that tokens have.
    """

    ids: list[int]
    num_real: int
    num_rows: int
    seed: int

    def fill(self, table: Tensor, index: int) -> None:
        """Initialise them in `table` (V, D); index: 0 for the embeddings, 1 for an untied head."""
        generator = torch.Generator().manual_seed(self.seed + index)
        noise = torch.randn(len(self.ids), table.shape[1], generator=generator)
        real = table[: min(self.num_real, self.num_rows)].float()
        table[self.num_rows :] = real.mean(0)  # rows that only round the table up
        table[self.ids] = (real.mean(0) + 0.1 * real.std(0) * noise).to(table.dtype)


def _add_tokens(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> _NewRows:
    """Add the K tokens and enlarge the tables; return the rows that need initial values."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    num_real, known = len(tokenizer), tokenizer.get_vocab()
    names = [bottleneck_token(i) for i in range(count)]
    tokenizer.add_special_tokens({"extra_special_tokens": names})
    # An export of lbr-ds has some of these tokens, with trained rows.
    ids: Any = tokenizer.convert_tokens_to_ids([name for name in names if name not in known])
    num_rows = len(_tables(backbone)[0])
    if num_real > num_rows:
        log.warning(
            "%d tokens of the backbone's tokenizer have no row in its embeddings of %d rows; they "
            "start at the mean of the others",
            num_real - num_rows,
            num_rows,
        )
    if len(tokenizer) > num_rows:
        backbone.resize_token_embeddings(
            len(tokenizer), pad_to_multiple_of=_ROUND_TO, mean_resizing=False
        )
    return _NewRows(ids, num_real, num_rows, seed)


def _tables(backbone: PreTrainedModel) -> list[nn.Parameter]:
    """Return the input embeddings and, where it is not tied, the head: (V, D) each."""
    modules: list[Any] = [backbone.get_input_embeddings(), backbone.get_output_embeddings()]
    return list({id(m.weight): m.weight for m in modules}.values())


def _append_to_texts(tokenizer: PreTrainedTokenizerBase, bottleneck: BottleneckConfig) -> None:
    """Make the tokenizer append B (without bottleneck the separator) to every text."""
    before = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id][:1]
    prefix: list[str] = list(tokenizer.convert_ids_to_tokens(before))
    suffix = [bottleneck_token(i) for i in range(bottleneck.count)]
    if bottleneck.count == 0 and bottleneck.separator == "eos":
        suffix = [tokenizer.eos_token]
    special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in dict.fromkeys(prefix + suffix)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*prefix, "$A", *suffix],
        pair=[*prefix, "$A", *suffix, "$B:1", *(f"{t}:1" for t in suffix)],
        special_tokens=special,
    )
    tokenizer.chat_template = None
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"


def keep_first(folder: Path, count: int) -> Card:
    """Make a model folder append only the first `count` of its bottleneck tokens to every text.

    Returns its new card.
    """
    card = Card.load(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    dropped = {bottleneck_token(i) for i in range(count, card.num_bottleneck)}
    processor = content["post_processor"]
    for form in ("single", "pair"):
        parts = processor[form]
        kept = [part for part in parts if part.get("SpecialToken", {}).get("id") not in dropped]
        processor[form] = kept
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    card = replace(card, num_bottleneck=count, ratio=None)
    card.save(folder)
    return card


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save so that every loader takes tokenizer.json as it is.

    A model-specific class would rebuild the post-processor from its own flags and lose B.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # "<s>" or "<|bottleneck_0|>" written in a text is text: every reader of this folder (this
    # package, transformers, sentence-transformers) encodes it as such, so their vectors agree.
    config["split_special_tokens"] = True
    # transformers 4 adds token_type_ids by default, which GPT-2 adds to the embeddings.
    config["model_input_names"] = ["input_ids", "attention_mask"]
    # The first three would rebuild the post-processor; the rest are transformers 5 spellings that
    # transformers 4 (older servers) cannot read and that tokenizer.json says already.
    for key in (
        "add_bos_token",
        "add_eos_token",
        "auto_map",
        "extra_special_tokens",
        "backend",
        "is_local",
        "local_files_only",
    ):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _hide_control_tokens(folder / "tokenizer.json")


def _hide_control_tokens(path: Path) -> None:
    """Keep a Unigram model from finding control tokens in a text by itself.

    They are pieces of its vocabulary, with the best score of all. BPE has no merges that make them.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["model"]["type"] != "Unigram":
        return
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    for entry in content["model"]["vocab"]:
        if entry[0] in special:
            entry[1] = _NEVER
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a prepared backbone or a checkpoint. Raises CheckpointError."""
    with reading(folder, "the tokenizer", CheckpointError, "save or copy it again"):
        return open_tokenizer(str(folder), str(folder), trust_remote_code=False)
