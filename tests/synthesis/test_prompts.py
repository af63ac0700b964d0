"""Prompts, and the queries in answers as language models give them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from lbr_ds.config.synthesis import SynthesisConfig
from lbr_ds.synthesis.prompts import messages, parse

TWO = ["what is gout", "Why does my toe hurt?"]


@pytest.mark.parametrize(
    "answer",
    [
        "what is gout\nWhy does my toe hurt?",
        "1. what is gout\n2) Why does my toe hurt?",
        "- what is gout\n\n* Why does my toe hurt?\n",
        '"what is gout"\n\u201cWhy does my toe hurt?\u201d',
        "Here are two queries:\n\n1. **what is gout**\n2. **Why does my toe hurt?**",
        "Query 1: what is gout\nQ2: Why does my toe hurt?",
        "**Query 1:** what is gout\n**Query 2:** Why does my toe hurt?",
        "<think>The passage\nis about gout.</think>\nwhat is gout\nWhy does my toe hurt?",
        '```json\n["what is gout", "Why does my toe hurt?"]\n```',
        '["what is gout", "Why does my toe hurt?"]',
    ],
)
def test_queries_of_an_answer(answer: str) -> None:
    assert parse(answer) == TWO


@pytest.mark.parametrize("answer", ["", "  \n", "Here are the queries:", "<think>no end of it"])
def test_an_answer_without_queries(answer: str) -> None:
    assert parse(answer) == []


def test_numbers_and_brackets_of_a_query_stay() -> None:
    assert parse("3 signs of gout\n5-FU: what is it\n[MRI] of the toe") == [
        "3 signs of gout",
        "5-FU: what is it",
        "[MRI] of the toe",
    ]


def test_the_chat_shows_the_examples_and_only_the_beginning_of_the_passage() -> None:
    settings = SynthesisConfig.model_validate(
        {
            "prompt": "{domain} {count} of {passage} {other}",
            "domain": "Patients ask.",
            "queries": 2,
            "passage_chars": 12,
            "examples": [{"passage": "Gout hurts.", "queries": TWO}],
        }
    )
    assert messages(settings, "A {count} of words") == [
        {"role": "user", "content": "Patients ask. 2 of Gout hurts. {other}"},
        {"role": "assistant", "content": "\n".join(TWO)},
        {"role": "user", "content": "Patients ask. 2 of A {count} of {other}"},
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "Write {count} queries"}, r"the prompt has no \{passage\}"),
        ({"url": "localhost:8000/v1"}, r"give http:// or https://"),
        ({"examples": [{"passage": "p", "queries": []}]}, r"at least 1 item"),
    ],
)
def test_settings_that_cannot_work(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SynthesisConfig.model_validate(change)
