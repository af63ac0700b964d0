"""Which text is X and which is Y, for every objective; mixtures drawn by weight, the same again."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lbr_ds.batching import TextTokenizer, pack
from lbr_ds.batching.contrastive import contrastive_pairs
from lbr_ds.batching.generative import draw, generative_sequence, with_bag
from lbr_ds.config import OBJECTIVES, BottleneckConfig, ModelConfig
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.instructions import MIN_TEXT
from lbr_ds.model.bottleneck import Card, load_tokenizer, prepare_backbone
from lbr_ds.records import Record
from tests.tiny import backbone

PAIR = Record("1", "s", query="what is a fever", positives=["a fever is heat", "heat"])
PASSAGE = Record("2", "s", text="acute pain in the liver that is severe, number 7")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    config = ModelConfig(backbone=str(backbone(folder / "raw")), max_length=24)
    prepare_backbone(config, BottleneckConfig(count=2), folder / "made", 0)
    return TextTokenizer(load_tokenizer(folder / "made"), max_length=24, num_bottleneck=2)


def ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.backend(text, add_special_tokens=False)["input_ids"]


def test_a_continued_text_loses_no_token_to_a_begin_token(tmp_path: Path) -> None:
    """Prefix and suffix are the text, also where the tokenizer puts a token before it."""
    config = ModelConfig(backbone=str(backbone(tmp_path / "raw")), max_length=8)
    prepare_backbone(config, BottleneckConfig(count=2), tmp_path / "made", 0)
    backend = load_tokenizer(tmp_path / "made")
    b = backend("")["input_ids"]
    names = [backend.bos_token, *backend.convert_ids_to_tokens(b)]
    backend.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{names[0]} $A {' '.join(names[1:])}",
        special_tokens=list(zip(names, [backend.bos_token_id, *b], strict=True)),
    )
    begun = TextTokenizer(backend, max_length=8, num_bottleneck=2)
    made = generative_sequence(PASSAGE, "ib_continue", begun, turn=0, max_target_length=64)
    text = ids(begun, PASSAGE.text)
    assert len(text) > 2 * begun.max_text
    assert made.context[0] == backend.bos_token_id
    assert [*made.context[1:-2], *made.target] == [*text, backend.eos_token_id]


def test_every_objective(tokenizer: TextTokenizer) -> None:
    end = tokenizer.backend.eos_token_id
    b = tokenizer.contexts([""])[0]
    query, first, second = (ids(tokenizer, t) for t in (PAIR.query, *PAIR.positives))

    def sequence(record: Record, objective: str, turn: int = 0):
        return generative_sequence(record, objective, tokenizer, turn=turn, max_target_length=64)

    sft = sequence(PAIR, "ib_sft")
    assert (sft.context, sft.target, sft.cut) == (query + b, [*first, end], True)
    assert sequence(PAIR, "ib_sft", turn=1).target == [*second, end]
    assert sequence(PAIR, "ib_uncut") == replace(sft, cut=False)
    rebuilt = sequence(PAIR, "ib_reconstruct")
    assert (rebuilt.context, rebuilt.target) == (first + b, [*first, end])
    text = ids(tokenizer, PASSAGE.text)
    half = len(text) // 2
    continued = sequence(PASSAGE, "ib_continue")
    assert (continued.context, continued.target) == (text[:half] + b, [*text[half:], end])
    plain = sequence(PAIR, "plain_sft")
    assert (plain.context, plain.target, plain.cut) == ([*query, end], [*first, end], False)
    assert sequence(PASSAGE, "plain_sft").context == [end]
    for record, passage in ((PAIR, first), (PASSAGE, text)):
        alone = sequence(record, "plain_lm")
        assert (alone.context, alone.target, alone.cut) == ([end], [*passage, end], False)


def test_a_bag_holds_each_word_of_the_answer_once(tokenizer: TextTokenizer) -> None:
    answer = "a fever is heat heat heat"
    pair = Record("3", "s", query="what is a fever", positives=[answer])
    sequence = generative_sequence(pair, "ib_sft", tokenizer, turn=0, max_target_length=64)
    assert sequence.bag == []
    found = with_bag(sequence, tokenizer)
    text = ids(tokenizer, answer)
    assert len(set(text)) < len(text)
    assert found == replace(sequence, bag=sorted(set(text)))
    plain = generative_sequence(PASSAGE, "plain_lm", tokenizer, turn=0, max_target_length=64)
    assert with_bag(plain, tokenizer) == plain  # no X whose end could tell anything
    batch = pack([found, sequence, found])
    assert batch.bags is not None
    length = len(sequence.target)
    assert batch.bags.read.tolist() == [0, 2 * length]
    assert batch.bags.tokens.tolist() == [found.bag, found.bag]
    shorter = pack([found, replace(found, bag=found.bag[:1])])
    assert shorter.bags is not None
    filled = found.bag[:1] + [-1] * (len(found.bag) - 1)
    assert shorter.bags.tokens.tolist() == [found.bag, filled]
    ends = batch.read[batch.bags.read]  # the last bottleneck token of each
    assert ends.tolist() == [
        len(sequence.context) - 1,
        int(batch.starts[2]) + len(sequence.context) - 1,
    ]


def test_a_bag_holds_no_parts_of_characters(tokenizer: TextTokenizer) -> None:
    """The byte-level tokenizer knows no Chinese: each character is three tokens of a byte."""
    answer = "a fever \u53d1\u70ed is heat"
    pair = Record("3", "s", query="what is a fever", positives=[answer])
    sequence = generative_sequence(pair, "ib_sft", tokenizer, turn=0, max_target_length=64)
    parts = set(ids(tokenizer, "\u53d1\u70ed"))
    assert len(ids(tokenizer, "\u53d1\u70ed")) == 6
    assert all(tokenizer.is_part(token) for token in parts)
    assert with_bag(sequence, tokenizer).bag == sorted(set(ids(tokenizer, answer)) - parts)
    # Of an answer that has nothing else they are the bag.
    other = replace(
        sequence, target=[*ids(tokenizer, "\u53d1\u70ed"), tokenizer.backend.eos_token_id]
    )
    assert with_bag(other, tokenizer).bag == sorted(parts)


def test_without_a_bottleneck_gl_learns_what_is_read(tmp_path: Path) -> None:
    """The context is the sequence that is embedded: the state at its end is trained and read."""
    config = ModelConfig(backbone=str(backbone(tmp_path / "raw")), max_length=24)
    prepare_backbone(config, BottleneckConfig(count=0), tmp_path / "made", 0)
    tokenizer = TextTokenizer(load_tokenizer(tmp_path / "made"), max_length=24, num_bottleneck=0)
    learnt = generative_sequence(PAIR, "plain_sft", tokenizer, turn=0, max_target_length=64)
    assert learnt.context == tokenizer.embed([PAIR.query])[0].context
    assert not learnt.cut


TEMPLATE = "{% for m in messages %}<s>{{ m.role }} says<s>{{ m.content }}</s>{% endfor %}then"


def without_bottleneck(folder: Path, separator: str, **more: Any) -> TextTokenizer:
    raw = backbone(folder / "raw")
    config = json.loads((raw / "tokenizer_config.json").read_text())
    (raw / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
    model = ModelConfig(backbone=str(raw), max_length=40)
    settings = BottleneckConfig.model_validate({"count": 0, "separator": separator})
    prepare_backbone(model, settings, folder / "made", 0)
    chat = Card.load(folder / "made").chat
    backend = load_tokenizer(folder / "made")
    return TextTokenizer(backend, max_length=40, num_bottleneck=0, chat=chat)


def test_the_paper_s_gl_has_nothing_between_question_and_answer(tmp_path: Path) -> None:
    """The text's own last token predicts the answer and is read; an empty text has one token."""
    made = without_bottleneck(tmp_path, "none")
    end = made.backend.eos_token_id
    query, answer = ids(made, PAIR.query), ids(made, PAIR.positives[0])
    learnt = generative_sequence(PAIR, "plain_sft", made, turn=0, max_target_length=64)
    assert [*learnt.context, *learnt.target] == [*query, *answer, end]
    assert made.embed([PAIR.query])[0].context == learnt.context
    batch = pack([learnt])
    assert batch.read[0] == len(query) - 1
    assert batch.targets is not None
    assert batch.targets[0] == answer[0]
    assert made.contexts(["", "a fever"]) == [[end], ids(made, "a fever")]


def test_a_question_in_a_chat_template(tmp_path: Path) -> None:
    """The context is what the backbone's own tokenizer makes of the question as a chat."""
    made = without_bottleneck(tmp_path, "chat", chat_template=TEMPLATE)
    raw = AutoTokenizer.from_pretrained(tmp_path / "raw")
    chat = [{"role": "user", "content": PAIR.query}]
    wanted = raw.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    learnt = generative_sequence(PAIR, "plain_sft", made, turn=0, max_target_length=64)
    assert learnt.context == wanted
    assert made.embed([PAIR.query])[0].context == ids(made, PAIR.query)
    long = generative_sequence(
        replace(PAIR, query="fever " * 90), "plain_sft", made, turn=0, max_target_length=64
    )
    assert len(long.context) == made.max_length
    after = raw("</s>then", add_special_tokens=False)["input_ids"]
    assert long.context[-len(after) :] == after


def test_separators_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no chat template; use separator eos or none"):
        without_bottleneck(tmp_path / "a", "chat")
    long = TEMPLATE.replace("says", "says " * 40)
    with pytest.raises(ConfigError, match=r"at least 8 are needed; raise model\.max_length to"):
        without_bottleneck(tmp_path / "b", "chat", chat_template=long)
    with pytest.raises(ValidationError, match="separator=none is for a backbone without"):
        BottleneckConfig(count=2, separator="none")


def test_sft_of_a_plain_passage_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match="record 2: objective ib_sft needs a query"):
        generative_sequence(PASSAGE, "ib_sft", tokenizer, turn=0, max_target_length=8)


def test_targets_are_cut_to_their_limit(tokenizer: TextTokenizer) -> None:
    for objective in OBJECTIVES:
        made = generative_sequence(PAIR, objective, tokenizer, turn=0, max_target_length=3)
        assert len(made.target) <= 3
        assert len(made.context) <= 24


@pytest.mark.parametrize("objective", [*OBJECTIVES])
def test_only_a_whole_text_ends_with_the_end_token(
    tokenizer: TextTokenizer, objective: str
) -> None:
    """The last id of Y is the end token exactly where all of the text fits before it."""
    end = tokenizer.backend.eos_token_id
    for limit in range(1, 40):
        made = generative_sequence(PAIR, objective, tokenizer, turn=0, max_target_length=limit)
        whole = generative_sequence(PAIR, objective, tokenizer, turn=0, max_target_length=64).target
        assert whole[-1] == end
        assert made.target == whole[:limit]


def test_an_instruction_that_leaves_no_room_is_refused(tokenizer: TextTokenizer) -> None:
    room = 24 - 2
    fits = replace(PAIR, instruction=" ".join(["?"] * 7) + "?")
    assert len(ids(tokenizer, fits.instruction)) == room - MIN_TEXT
    context = generative_sequence(fits, "ib_sft", tokenizer, turn=0, max_target_length=8).context
    assert (
        context
        == ids(tokenizer, fits.instruction + PAIR.query)[:room] + tokenizer.contexts([""])[0]
    )
    full = replace(fits, instruction=" ".join(["?"] * 8))
    message = (
        f"record 1 of {PAIR.source}: its instruction '(\\? ?){{8}}' has 15 tokens, bottleneck and "
        "special tokens are 2, which leaves 7 of model.max_length=24 for the text .at least 8 are "
        "needed.; shorten the instruction or raise model.max_length to 25"
    )
    for objective in ("ib_sft", "ib_uncut", "plain_sft"):
        with pytest.raises(DataError, match=f"^{message}$"):
            generative_sequence(full, objective, tokenizer, turn=0, max_target_length=8)
    with pytest.raises(DataError, match=f"^{message}$"):
        contrastive_pairs([PAIR, full], [0, 0], tokenizer, 1)
    for objective in ("ib_reconstruct", "ib_continue", "plain_lm"):
        generative_sequence(full, objective, tokenizer, turn=0, max_target_length=8)


def test_control_tokens_in_a_text_are_text(tokenizer: TextTokenizer) -> None:
    """Written out they are encoded as any other letters, and decode to themselves."""
    special = [*tokenizer.backend.all_special_tokens, "<|bottleneck_0|>", "<|bottleneck_1|>"]
    for text in special:
        ids = tokenizer.plain(text, 64)
        assert not set(ids) & (tokenizer.special_ids | {*tokenizer.contexts([""])[0]})
        assert tokenizer.text(ids) == text
        pair = replace(PAIR, query=text, positives=[text])
        made = generative_sequence(pair, "ib_sft", tokenizer, turn=0, max_target_length=64)
        assert made.context == ids + tokenizer.contexts([""])[0]
        assert made.target == [*ids, tokenizer.backend.eos_token_id]


def test_mixture_follows_its_weights_and_its_key() -> None:
    weights = {"ib_sft": 3.0, "ib_reconstruct": 1.0}
    drawn = [draw(weights, 0, 0, step, 0) for step in range(2000)]
    assert drawn == [draw(dict(reversed(weights.items())), 0, 0, step, 0) for step in range(2000)]
    assert Counter(drawn)["ib_sft"] / 2000 == pytest.approx(0.75, abs=0.04)
