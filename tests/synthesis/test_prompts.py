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


@pytest.mark.parametrize(
    "query",
    [
        "what is gout",
        "5 signs of gout",
        "\u4ec0\u4e48\u662f\u7cd6\u5c3f\u75c5\uff1f",
        "2\u578b\u7cd6\u5c3f\u75c5\u662f\u4ec0\u4e48\uff1f",
        "\u7cd6\u5c3f\u75c5\u3068\u306f\u4f55\u3067\u3059\u304b\uff1f",
        "\u0645\u0627 \u0647\u0648 \u0627\u0644\u0633\u0643\u0631\u064a\u061f",
        "\u0e42\u0e23\u0e04\u0e40\u0e01\u0e32\u0e15\u0e4c\u0e04\u0e37\u0e2d\u0e2d\u0e30\u0e44\u0e23",
    ],
    ids=["english", "english digit", "chinese", "chinese digit", "japanese", "arabic", "thai"],
)
def test_a_prefix_of_any_script_is_removed(query: str) -> None:
    """In Latin, full-width, Arabic-Indic and Thai digits; without a space if no digit follows."""
    spaced = ["1. ", "12) ", "(3) ", "\uff14\uff0e", "\u0661. ", "\u0663) ", "\u0e51. ", "Q1\uff1a"]
    wide = ["1\u3001", "2\uff0e", "3\uff09", "\uff084\uff09", "\u30105\u3011", "6\uff1a"]
    wide += ["\uff17\u3001", "\u2460", "\u30fb"]
    digit = query[0].isdigit()
    prefixes = [f"{p.strip()} " for p in spaced + wide] if digit else spaced + wide
    assert [parse(prefix + query) for prefix in prefixes] == [[query]] * len(prefixes)


@pytest.mark.parametrize(
    "query",
    [
        "0.9% saline for what?",
        "3.11 python new features",
        "2:1 block on an ECG",
        "query 3.11 of python",
        "q.i.d. dose of ibuprofen",
        "0.9%\u6c2f\u5316\u94a0\u7684\u7528\u9014\uff1f",
        "\uff10\uff0e\uff19\uff05\u98df\u5869\u6c34\u3068\u306f\uff1f",
        "1\u30012\u578b\u7cd6\u5c3f\u75c5\u7684\u533a\u522b",
        "\u0660.\u0669% \u0645\u062d\u0644\u0648\u0644 \u0645\u0644\u062d\u064a",
        "\u0e50.\u0e59% \u0e19\u0e49\u0e33\u0e40\u0e01\u0e25\u0e37\u0e2d",
    ],
)
def test_a_number_at_the_beginning_of_a_query_is_no_prefix(query: str) -> None:
    assert [parse(f"{prefix}{query}") for prefix in ("", "- ", "1. ")] == [[query]] * 3


def test_half_a_surrogate_pair_in_a_json_list_is_replaced() -> None:
    assert parse('["gout \\ud83d\\ude00", "toe \\ud83d", "\\ude00 pain"]') == [
        "gout \U0001f600",
        "toe \ufffd",
        "\ufffd pain",
    ]


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
