"""Measures of written texts: their definitions, in any script."""

from __future__ import annotations

from functools import cache

import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from lbr_ds.corpora.curate.segmentation import spaced, tokens
from lbr_ds.evaluation.text_metrics import bleu_4, chrf, mean, rouge_l
from tests.corpora.test_segmentation import CASES

EXTRA = {
    "hi": "\u0930\u0915\u094d\u0924\u091a\u093e\u092a",
    "he": "\u05dc\u05d7\u05e5 \u05d3\u05dd",
    "one": "fever",
}
TEXTS = {**{language: case["passage"] for language, case in CASES.items()}, **EXTRA}


@pytest.mark.parametrize("language", TEXTS)
def test_equal_texts_have_100_and_others_less(language: str) -> None:
    text = TEXTS[language]
    assert bleu_4([text], [[text]]) == pytest.approx(100)
    assert chrf([text], [[text]]) == pytest.approx(100)
    assert rouge_l([text], [[text]]) == [100]
    if language in CASES:
        near, other = text.replace(*CASES[language]["particle"]), text[: len(text) // 2]
        for measure in (
            lambda t: bleu_4([t], [[text]]),
            lambda t: chrf([t], [[text]]),
            lambda t: rouge_l([t], [[text]])[0],
        ):
            assert 100 > measure(near) > measure(other) > 0


def test_a_wrong_answer_that_shares_a_dose() -> None:
    wrong, right = "\u53e3\u670d100mg 1\u5929", "\u6ce8\u5c04100mg 1\u56de"
    assert tokens(wrong) == ["\u53e3", "\u670d", "100mg", "1", "\u5929"]
    assert rouge_l([wrong], [[right]]) == [40]  # 2 of 5 tokens each
    found = bleu_4([wrong], [[right]])
    assert found is not None
    assert found < 40


def test_a_void_measure_is_none() -> None:
    assert rouge_l(["a", "b"], [["..."], ["b"]]) == [None, 100]
    assert bleu_4(["a", "b"], [["..."], ["b", "?!"]]) == pytest.approx(100)
    assert bleu_4(["a"], [["..."]]) is chrf(["a"], [["+"]]) is mean([None]) is None
    assert mean([None, 50.0, 100.0]) == 75
    assert rouge_l(["..."], [["fever"]]) == [0]


@cache
def longest(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """The longest common subsequence by its definition."""
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return longest(one[:-1], other[:-1]) + 1
    return max(longest(one[:-1], other), longest(one, other[:-1]))


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    texts = [*CASES["en"]["questions"], *CASES["zh"]["questions"], *CASES["ru"]["questions"]]
    for text in texts:
        for other in texts:
            one, two = tuple(tokens(text)), tuple(tokens(other))
            expected = 200 * longest(one, two) / (len(one) + len(two))
            assert rouge_l([text], [[other]]) == [pytest.approx(expected, abs=1e-4)]


@pytest.mark.parametrize(
    ("text", "references", "expected"),
    [
        # Lin 2004 (ROUGE), section 3.1: LCS of 3 and of 2 words of 4.
        ("police kill the gunman", ["police killed the gunman"], 75),
        ("the gunman kill police", ["police killed the gunman"], 50),
        # As Google's rouge-score 0.1.2 gives: letters and digits of ASCII, in small letters.
        (
            "The quick brown fox jumps over the lazy dog",
            ["The quick brown dog jumps on the log."],
            58.8235,
        ),
        ("a stone in the kidney", ["a stone kidney"], 75),
        ("Don't take 2.5mg+", ["do not take 2 5mg", "nothing alike"], 60),
    ],
)
def test_known_values_of_rouge_l(text: str, references: list[str], expected: float) -> None:
    assert rouge_l([text], [references]) == [expected]


def test_bleu_of_english_and_chinese_is_sacrebleus() -> None:
    for language, tokenizer in (("en", "13a"), ("zh", "zh"), ("ru", "13a")):
        case = CASES[language]
        texts = [case["passage"].replace(*case["particle"]), case["questions"][0]]
        references = [[case["passage"]], [case["questions"][1]]]
        theirs = BLEU(tokenize=tokenizer).corpus_score(texts, [[own[0] for own in references]])
        assert bleu_4(texts, references) == pytest.approx(theirs.score)
    chinese = CASES["zh"]["passage"] + "\u300c\uff23\uff34\u300d\uff0c100mg/d (\u4e24\u6b21)."
    assert Tokenizer13a()(spaced(chinese)) == TokenizerZh()(chinese)
