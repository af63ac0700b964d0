"""The token ids that a backbone's chat template puts around a user's message.

Stage 1 without a bottleneck may train in this form (`bottleneck.separator=chat`), as plain
supervised fine-tuning of a chat model does. The template itself is not kept in prepared folders,
because sentence-transformers 6 would feed texts through it.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lbr_ds.config import ModelConfig
from lbr_ds.errors import ConfigError
from lbr_ds.instructions import MIN_TEXT

Frame = tuple[list[int], list[int]]  # ids before and after the message
_MESSAGE = "MESSAGE"


def chat_frame(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Return the ids before and after the message of a user whom the model is about to answer.

    Raises:
        ConfigError: the backbone has no chat template, or `model.max_length` leaves no room in it.
    """
    where = f"bottleneck.separator=chat: model.backbone={model.backbone!r}"
    if tokenizer.chat_template is None:
        raise ConfigError(f"{where} has no chat template; use separator eos or none")
    message = [{"role": "user", "content": _MESSAGE}]
    text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    parts = text.split(_MESSAGE)
    if len(parts) != 2:
        raise ConfigError(f"{where}: its chat template does not hold the message exactly once")
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
    if (room := model.max_length - len(before) - len(after)) < MIN_TEXT:
        raise ConfigError(
            f"{where}: its chat template leaves {room} of model.max_length={model.max_length} "
            f"tokens for the text, at least {MIN_TEXT} are needed; raise model.max_length to "
            f"{model.max_length + MIN_TEXT - room}"
        )
    return before, after
