"""Text of any script: likeness behaves alike, and what is not seen does not count.

`questions.json` holds, for seven languages, 50 real diseases and 6 questions about a disease, a
passage with a particle that may change and a remark that may follow, and pairs that ask different
things in nearly the same words.
"""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.corpora.curate.cleaning import clean, shares_letters
from lbr_ds.corpora.curate.segmentation import (
    jaccard,
    key,
    normalise,
    shingles,
    spaced,
    tokens,
    visible,
    words,
)
from lbr_ds.corpora.prepare import prepare
from lbr_ds.records import Record
from tests.corpora.toy import pair, read_all, recipe

CASES: dict[str, Any] = json.loads(
    Path(__file__).with_name("questions.json").read_text(encoding="utf-8")
)
NEAR = 0.7  # the default of data.near_duplicate
INVISIBLE = [
    "\u200b",
    "\ufeff",
    "\u00ad\u00ad",
    "\0",
    "\u2060 \u200e",
    "\u3164",
    "\u2800",
    "\ufe0f",
    "\U000e0041",
]


def questions(language: str) -> list[str]:
    case = CASES[language]
    return [question.format(d) for d in case["diseases"] for question in case["questions"]]


@cache
def tied(language: str) -> int:
    """How many of the 300 questions have a near duplicate; by brute force, as test_near.py shows
    `families` to equal."""
    sets = list(map(shingles, questions(language)))
    near = (
        pair
        for pair in combinations(range(300), 2)
        if jaccard(sets[pair[0]], sets[pair[1]]) >= NEAR
    )
    return len({number for pair in near for number in pair})


@pytest.mark.parametrize("language", CASES)
def test_questions_about_different_diseases_are_not_tied(language: str) -> None:
    assert len(set(map(normalise, questions(language)))) == 300
    assert tied(language) <= tied("en") + 0.05 * 300
    # Of these questions: Arabic has one pair of eleven words of which one differs.
    assert tied(language) == (2 if language == "ar" else 0)


@pytest.mark.parametrize("language", CASES)
def test_what_one_character_decides_is_not_near(language: str) -> None:
    for one, other in CASES[language]["unlike"]:
        assert jaccard(shingles(one), shingles(other)) < NEAR, (one, other)


def wide(text: str) -> str:
    """The text in full-width letters, digits and signs."""
    return "".join(chr(ord(s) + 0xFEE0) if "!" <= s <= "~" else s for s in text)


@pytest.mark.parametrize("language", CASES)
def test_what_says_the_same_is_near(language: str) -> None:
    case = CASES[language]
    text = case["passage"]
    bare = "".join(s for s in text if unicodedata.category(s)[0] != "P")
    hidden = "\u200b".join(text.split(",")).replace(" ", " \u00ad ") + "\ufeff"
    same = [f" {text.upper()} !!", wide(text), bare, unicodedata.normalize("NFD", text), hidden]
    for other in same:
        assert key(other) == key(text)
        assert jaccard(shingles(text), shingles(other)) == 1
    for other in (text.replace(*case["particle"]), text + case["remark"]):
        assert key(other) != key(text)
        assert NEAR < jaccard(shingles(text), shingles(other)) < 1
    if language in ("zh", "ja", "th", "ko"):
        loose = text.replace("", " ") if language in ("zh", "ja") else text.replace(" ", "")
        assert jaccard(shingles(text), shingles(loose)) == 1
        assert (key(loose) == key(text)) == (language != "ko")  # in Korean blanks part words


def test_a_shingle_is_two_words_or_as_much_of_letters() -> None:
    assert shingles("High blood!") == {" high", "high blood", "blood "}
    assert shingles("") == {" "}
    assert shingles("\u9ad8\u8840") == {" \u9ad8", " \u9ad8 \u8840", "\u9ad8 \u8840 ", "\u8840 "}
    six = "\u9ad8\u8840\u538b\u60a3\u8005\u5403"
    assert {run for run in shingles(six) if run == run.strip()} == {
        " ".join(six[:5]),
        " ".join(six[1:]),
    }
    mixed = shingles("aspirin\u9ad8\u8840\u538b")
    assert "aspirin \u9ad8 \u8840 \u538b" in mixed
    assert shingles("\uac00\ub098 \ub2e4") == shingles("\uac00 \ub098\ub2e4")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # Arabic vowels, tatweel, yeh
        (
            "\u0645\u064f\u0633\u062a\u064e\u0634\u0641\u0649",
            "\u0645\u0633\u062a\u0640\u0634\u0641\u064a",
        ),
        ("\u0623\u062f\u0648\u064a\u0629", "\u0627\u062f\u0648\u064a\u0629"),  # hamza
        ("\u06a9\u0628\u062f\u06cc", "\u0643\u0628\u062f\u064a"),  # Persian letters
        ("\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd", "\u05e9\u05dc\u05d5\u05dd"),  # Hebrew points
        # Russian yo, stress
        ("\u043b\u0451\u0433\u043a\u0438\u0435", "\u043b\u0435\u0301\u0433\u043a\u0438\u0435"),
        ("\u0e19\u0e49\u0e33", "\u0e19\u0e4d\u0e49\u0e32"),  # Thai: order of tone and sara am
        ("\u0e40\u0e40\u0e1c\u0e25", "\u0e41\u0e1c\u0e25"),  # sara ae as two sara e
        ("\uff76\uff9e\uff9d", "\u30ac\u30f3"),  # half-width kana
        ("\u1112\u1161\u11ab", "\ud55c"),  # jamo
        ("CT \u68c0\u67e5", "\uff23\uff34\u68c0\u67e5"),
        ("\u80ba\u764c\uff0c \u809d\u764c", "\u80ba\u764c\u809d\u764c"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0631", "\u0645\u06cc\u062e\u0648\u0631"),  # joiner
        ("\u2764\ufe0f pain", "\u2764 pain"),
    ],
)
def test_normalise_sees_through_spellings(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)
    assert key(one) == key(other)


def test_normalise_keeps_what_differs() -> None:
    apart = [
        ("\u0e14\u0e34", "\u0e14\u0e35"),  # Thai vowel signs
        ("\u0915\u0940", "\u0915\u093f"),  # Devanagari vowel signs
        ("\u304b\u3093", "\u304c\u3093"),  # voiced kana
        ("e\u0301tat", "etat"),
        ("\u0439", "\u0438"),
        ("\ud55c \ubc88", "\ud55c\ubc88"),
    ]
    for one, other in apart:
        assert normalise(one) != normalise(other), (one, other)


def test_terms_and_tokens_by_script() -> None:
    assert words("\uace0\ud608\uc555\uc740 \uc57d") == [
        "\uace0\ud608",
        "\ud608\uc555",
        "\uc555\uc740",
        "\uc57d",
    ]
    thai, russian = (
        "\u0e04\u0e27\u0e32\u0e21\u0e14",
        "\u0434\u0430\u0432\u043b\u0435\u043d\u0438\u0435",
    )
    assert words(thai) == [thai[:4], thai[1:]]
    assert words(f"{russian}, Na+") == [russian, "na+"]
    assert tokens("Na+ isn't co-op; $5_x") == ["na", "isn", "t", "co", "op", "5", "x"]
    assert tokens("\u670d100mg \u0939\u093f\u0928\u094d\u0926\u0940 \uc57d\uc740") == [
        "\u670d",
        "100mg",
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        "\uc57d\uc740",
    ]
    marked = "\u0e17\u0e35\u0e48", "\u0e19\u0e35\u0e48"  # Thai consonants with a vowel and a tone
    assert tokens("".join(marked)) == list(marked)
    assert tokens("... +/- \u3002") == []
    assert spaced("plain text, as it is") == "plain text, as it is"


@pytest.mark.parametrize("text", INVISIBLE)
def test_what_nobody_sees_is_empty(text: str) -> None:
    assert not visible(text)
    assert not visible(clean(text))
    assert clean(f"{text}a b{text}".replace("\u2800", "").replace("\ufe0f", "")) == "a b"


def test_what_is_seen_stays() -> None:
    assert not visible("\u115f\u1160 \u034f")
    for text in ("a", "...", "\u3002", "\u0640", "\u064b", "\u06dd", "+", "\U0001f600", "\u75c5"):
        assert visible(text), ascii(text)
    kept = [
        "\u0646\u0645\u06cc\u200c\u062e\u0648\u0631\u062f",
        "\u0915\u094d\u200d\u0937",
        "\U0001f468\u200d\u2695\ufe0f",
    ]
    assert [clean(text) for text in kept] == kept
    assert clean("\ufeffso\u00adft\0ware\u200b \u200dis\u200c") == "soft ware is"


def test_empty_texts_are_counted(tmp_path: Path) -> None:
    raws = [pair(i) for i in range(30)]
    for number, text in enumerate(INVISIBLE):
        raws[number]["query"] = text
    raws[20]["positives"] = ["\u200b"]
    raws[21]["positives"] = ["\u200b", *raws[21]["positives"]]
    raws[22]["negatives"] = ["\ufeff", "wrong"]
    raws[23] = {"id": "r23", "source": "toy", "text": "\u00ad\u200b"}
    data = recipe(tmp_path, raws, near_duplicate=1)
    made = prepare(data, 0)
    assert made["dropped_records"]["empty"]["count"] == len(INVISIBLE) + 2
    assert made["dropped_texts"]["positive_empty"]["count"] == 1
    assert made["dropped_texts"]["negative_empty"]["count"] == 1
    kept = {r.id: r for records in read_all(data.folder).values() for r in records}
    assert kept.keys() == {f"r{i}" for i in range(30)} - {
        *(f"r{i}" for i in range(len(INVISIBLE))),
        "r20",
        "r23",
    }
    assert kept["r21"].positives == raws[21]["positives"][1:]
    assert kept["r22"].negatives == ["wrong"]


def test_shared_letters_are_those_of_the_normalised_text() -> None:
    record = Record("1", "s", "\uff21\uff53\uff50\uff49\uff52\uff49\uff4e", ["old aspi\u00adrin"])
    assert shares_letters(record, 6)
    assert not shares_letters(record, 7)
