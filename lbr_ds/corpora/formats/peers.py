"""The shapes of other trainers' files ("peers"): what identifies each, and how its rows are read.

A column of a peer may have several names (the first that a row has is used), and passages may be
texts or objects (`passage_texts` of `values.py`). README.md shows a row of each.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.formats.interface import Skipped, listing
from lbr_ds.corpora.formats.peer import (
    Made,
    Peer,
    is_anything,
    is_list,
    is_nested,
    is_number,
    is_text,
    is_texts,
    is_turns,
)
from lbr_ds.corpora.formats.values import (
    IncompleteRecipe,
    as_text,
    cell_text,
    column_value,
    named_parts,
    objects,
    passage_texts,
)
from lbr_ds.errors import DataError

_MIN_SCORE = 0.8
_USER, _ANSWERS = ("user", "human", "prompter"), ("assistant", "gpt", "chatgpt", "bing", "bard")
_ENTAILED, _NOT_ENTAILED = ("0", "entailment"), ("1", "2", "-1", "neutral", "contradiction", "")


def _scored(peer: Peer, row: dict[str, Any], source: SourceConfig, where: str) -> Made:
    """Return the pair if its score is at least `min_score`."""
    column = peer.column(row, source.columns.answer, peer.score, where)
    given = column_value(row, column, where)
    try:
        score = float(given)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {column} must be a number, not {given!r:.60}") from None
    if score > 1 and source.min_score is None:
        raise IncompleteRecipe(
            f"{where}: {column} is {score:g}, but scores are taken to be at most 1; set the lowest "
            "score of a pair in data.sources.min_score, or read all rows with `shape: triplets`"
        )
    least = _MIN_SCORE if source.min_score is None else source.min_score
    if not score >= least:
        return Skipped("below_min_score", f"{where}: {column} is {score:g}, below {least:g}")
    return [{**peer.texts(row, source, where), **named_parts(row, source, where)}]


def _entailed(peer: Peer, row: dict[str, Any], source: SourceConfig, where: str) -> Made:
    """Return the pair if the premise entails the hypothesis."""
    column = peer.column(row, source.columns.answer, peer.score, where)
    label = (as_text(column_value(row, column, where)) or "").strip().lower()
    if label in _NOT_ENTAILED:
        return Skipped("not_entailed", f"{where}: {column} is {label!r}")
    if label not in _ENTAILED:
        raise DataError(
            f"{where}: {column} {label!r:.60} is none of entailment (0), neutral (1) and "
            "contradiction (2); select rows with data.sources.where and `shape: pairs`"
        )
    return [{**peer.texts(row, source, where), **named_parts(row, source, where)}]


def _set(peer: Peer, row: dict[str, Any], source: SourceConfig, where: str) -> Made:
    """Return the first text of a set as the query, the others as its positives."""
    column = peer.column(row, source.columns.query, peer.query, where)
    first, *others = passage_texts(column_value(row, column, where), column, where) or [""]
    return [{"query": first, "positives": others, **named_parts(row, source, where)}]


def _instructed(peer: Peer, row: dict[str, Any], source: SourceConfig, where: str) -> Made:
    """Return the record of a row of [instruction, text]; a line break is put between the two."""
    query = peer.column(row, source.columns.query, peer.query, where)
    sides = {"query": [column_value(row, query, where)]}
    for name, columns in peer.answers(row, source, where).items():
        held = [column_value(row, column, where) for column in columns]
        sides[name] = [one for value in held for one in _listed(value)]
    made: dict[str, Any] = {}
    stated: dict[str, set[str]] = {"instruction": set(), "document_instruction": set()}
    for name, values in sides.items():
        pairs = [["", one] if is_text(one) else one for one in values]
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and all(map(is_text, pair))):
                raise DataError(f"{where}: {name} must be [instruction, text], not {pair!r:.60}")
        side = "instruction" if name == "query" else "document_instruction"
        stated[side] |= {instruction for instruction, _ in pairs}
        made[name] = [text for _, text in pairs]
    for name, found in stated.items():
        if len(found) > 1:
            raise DataError(
                f"{where}: its passages have different instructions {sorted(found)!r:.80}; a "
                "record has one for all of them"
            )
        instruction = "".join(found)
        if instruction:
            made[name] = instruction if instruction[-1].isspace() else f"{instruction}\n"
    return [{**made, "query": made["query"][0], **named_parts(row, source, where)}]


def _chat(peer: Peer, row: dict[str, Any], source: SourceConfig, where: str) -> Made:
    """Return the first question of a conversation with its answer.

    Later turns depend on those before and are left out, as system prompts are. ms-swift's
    `positive_messages` and `negative_messages` are the answers if there are any.
    """
    column = peer.column(row, source.columns.query, peer.query, where)
    turns = [
        (str(turn.get("role", turn.get("from", ""))).lower(), _content(turn, column, where))
        for turn in objects(column_value(row, column, where))
        if isinstance(turn, dict)
    ]
    raw = named_parts(row, source, where)
    if row.get("positive_messages"):
        asked = [text for role, text in turns if role in _USER]
        answers = {
            f"{side}s": _answers(row.get(f"{side}_messages"), f"{side}_messages", where)
            for side in ("positive", "negative")
        }
        return [{"query": asked[0] if asked else "", **answers, **raw}]
    for (role, question), (next_role, answer) in pairwise(turns):
        if role in _USER and next_role in _ANSWERS:
            return [{"query": question, "positives": [answer], **raw}]
    roles = listing(role for role, _ in turns)
    raise DataError(
        f"{where}: no user turn with an answer in column {column!r}; its turns: {roles}"
    )


def _answers(messages: Any, name: str, where: str) -> list[str]:
    """Return the text of each conversation in a list: its turns but the system prompt."""
    texts = []
    for conversation in _listed(messages):
        turns = objects(conversation)
        if not is_turns(turns):
            raise DataError(
                f"{where}: {name} must be a list of lists of turns, not {messages!r:.60}"
            )
        said = [turn for turn in turns if turn.get("role") != "system"]
        texts.append("\n".join(_content(turn, name, where) for turn in said))
    return texts


def _listed(value: Any) -> list[Any]:
    """Return a list as it is, nothing for null, and any other value in a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _content(turn: dict[str, Any], column: str, where: str) -> str:
    """Return the text of a turn; of a list of parts, those of text."""
    content = turn.get("content", turn.get("value"))
    if not isinstance(content, list):
        return cell_text(content, column, where)
    return "\n".join(
        passage for part in content for passage in passage_texts(part, column, where) if passage
    )


def _by_id(peer: Peer, row: dict[str, Any], source: SourceConfig, where: str) -> Made:
    """Return the record of a row with ids of documents; they are replaced by texts later."""
    if not source.documents:
        column = peer.column(row, "", peer.positives, where)
        raise IncompleteRecipe(
            f"{where}: column {column!r} holds ids; name the file of the documents in "
            "data.sources.documents"
        )
    return [{**peer.texts(row, source, where), **named_parts(row, source, where)}]


_NEGATIVES = r"(neg|negative)([_ -]?\d+)?|rejected_response"
_TRIPLETS = Peer(
    "sentence-transformers pairs, triplets or n-tuples",
    query=("anchor", "query", "question", "prompt"),
    positives=(
        "positive",
        "answer",
        "answers",
        "response",
        "completion",
        "document",
        "passage",
        "pos",
    ),
    negatives=_NEGATIVES,
    tuple_scores=("score", "scores", "label", "labels"),
    unless="options|choices",
)
PEERS: dict[str, Peer] = {  # in the order in which they are tried
    "gritlm": Peer(
        "GritLM",
        query=("query",),
        positives=("pos",),
        negatives="neg",
        is_query=is_anything,
        is_positives=is_nested,
        make=_instructed,
    ),
    "flag_embedding": Peer(
        "FlagEmbedding",
        query=("query",),
        positives=("pos",),
        negatives="neg",
        instruction="prompt",
        teacher=(("pos_scores",), ("neg_scores",)),
        is_positives=is_texts,
    ),
    "tevatron": Peer(
        "Tevatron",
        query=("query",),
        positives=("positive_passages",),
        negatives="negative_passages",
    ),
    "tevatron_ids": Peer(
        "Tevatron with document ids",
        query=("query_text", "query"),
        positives=("positive_document_ids",),
        negatives="negative_document_ids",
        make=_by_id,
    ),
    "nemo": Peer(
        "NeMo",
        query=("query", "question"),
        positives=("pos_doc",),
        negatives="neg_doc",
        teacher=(("pos_doc_scores", "pos_doc_score"), ("neg_doc_scores", "neg_doc_score")),
    ),
    "messages": Peer(
        "chats",
        query=("messages",),
        negatives="(positive|negative)_messages",
        is_query=is_turns,
        make=_chat,
    ),
    "conversations": Peer(
        "ShareGPT chats", query=("conversations",), is_query=is_turns, make=_chat
    ),
    "nli": Peer(
        "premises and hypotheses, of which the entailed are pairs",
        query=("premise",),
        positives=("hypothesis",),
        score=("label", "gold_label"),
        make=_entailed,
    ),
    "scored_pairs": Peer(
        "sentence-transformers pairs with a score, of which those of min_score or more count",
        query=("sentence1", "sentence_A", "text1", "anchor", "query", "question"),
        positives=("sentence2", "sentence_B", "text2", "positive", "answer", "response"),
        score=("score", "label", "similarity_score", "similarity"),
        unless=f"{_NEGATIVES}|options|choices",
        is_positives=is_text,
        is_score=is_number,
        make=_scored,
    ),
    "triplets": _TRIPLETS,
    "sets": Peer(
        "sets of equivalent texts",
        query=("set", "sentences", "texts"),
        is_query=is_list,
        make=_set,
    ),
    "msmarco_triples": replace(
        _TRIPLETS,
        title="MS MARCO triples",
        query=("query",),
        positives=("positive",),
        negatives="negative",
        header=("query", "positive", "negative"),
    ),
}
