"""Ask a causal language model in this process, in batches, over any number of ranks.

A batch is a fixed block of the passages with a seed of its own (`ask.py`), so that an answer
depends neither on the ranks nor on what an earlier command has already answered.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from lbr_ds.config import ModelConfig, RunConfig
from lbr_ds.model.backbone import open_generator
from lbr_ds.synthesis.prompts import Message

log = logging.getLogger(__name__)


class LocalModel:
    """A causal language model, whole: `model.num_layers` does not shorten it."""

    def __init__(self, run: RunConfig) -> None:
        settings, own = run.synthesis, run.model
        key = "synthesis.model" if settings.model else "model.backbone"
        name = settings.model or own.backbone
        changed = {"backbone": name} | ({"revision": None} if settings.model else {})
        model = ModelConfig.model_validate({**own.model_dump(), **changed})
        self.settings = settings
        opened: Any = open_generator(f"{key}={name!r}", model)
        self.model, self.tokenizer = opened
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device).eval()
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not self.tokenizer.chat_template:
            log.info("%s has no chat template; it continues the prompt as plain text", name)

    @torch.no_grad()
    def answer(self, chats: Sequence[list[Message]], seed: int) -> list[str]:
        """Return the answers to a batch of chats."""
        texts = [self._text(chat) for chat in chats]
        chat = bool(self.tokenizer.chat_template)
        batch = self.tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=not chat
        ).to(self.device)
        warm = self.settings.temperature > 0
        options: dict[str, Any] = {"do_sample": warm}
        if warm:
            options |= {"temperature": self.settings.temperature, "top_k": 0, "top_p": 1.0}
            torch.manual_seed(seed)
        written = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.settings.max_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self._ends(),
            **options,
        )
        new = written[:, batch["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(new, skip_special_tokens=True))

    def _text(self, chat: list[Message]) -> str:
        if self.tokenizer.chat_template:
            made = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
            return str(made)
        turns = (f"{m['content']}\n\n{'Queries:' if m['role'] == 'user' else ''}" for m in chat)
        return "\n".join(turns).rstrip()

    def _ends(self) -> list[int]:
        """Return the tokens that end an answer: those of the model and of its tokenizer."""
        stated = getattr(self.model.generation_config, "eos_token_id", None)
        ends = stated if isinstance(stated, list) else [stated]
        return sorted({e for e in (*ends, self.tokenizer.eos_token_id) if e is not None})
