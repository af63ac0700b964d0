"""Normalise and segment text in any script, for everything that compares texts.

| function     | returns                                  | used for                             |
|--------------|------------------------------------------|--------------------------------------|
| `normalise`  | the text as it is compared               | exact duplicates, leaks, text hashes |
| `key`        | a hash of the normalised text            | "the same text" everywhere           |
| `shingles`   | the set of short runs of words, letters  | near duplicates, mining              |
| `similarity` | the Jaccard index of two texts' shingles | "nearly the same text" everywhere    |
| `words`      | the terms of the text                    | BM25 in mining and in `eval bm25`    |
| `tokens`     | words, or letters in unspaced scripts    | ROUGE-L, lengths of answers          |
| `spaced`     | the text with unspaced letters separated | BLEU                                 |
| `units`      | where its words, or letters, are         | spans of passages (`batching/crop`)  |

Scripts with spaces between words (Latin, Cyrillic, Greek, Arabic, Hebrew, Devanagari, ...) are
split at spaces. Chinese, Japanese, Korean, Thai, Lao, Khmer, Burmese and Tibetan are split into
letters, and runs of letters take the place of words. No dictionary is used: ICU's word boundaries
depend on the ICU version of the machine, every language has another segmenter, and near duplicates
must be the same texts on every machine. Korean has spaces, but usage varies, and particles are
attached to its words; therefore its spaces are ignored for shingles.

The length of a run makes the Jaccard index comparable across scripts. A shingle is the shortest run
of weight `_FULL`: two words, or 5 Chinese characters, 6 kana or Korean syllables, 12 Thai letters,
or a mixture of these, in which a word of one or two letters ("A", "1") weighs as much as kana. At
an index of 0.7, one word in eleven may differ in English, one character in 25 in Chinese and one
syllable in 29 in Korean: in both, a single character is often decisive (high or low blood pressure,
hepatitis A or B). With runs of two letters, as in search engines, texts half as long would already
be near duplicates.

Everything is derived from Python's Unicode tables: the results are the same on every machine and
Python version for all characters of Unicode 14 (2021).
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise

_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3041-\u3096\u3099-\u309f\u30a1-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff"
_HANGUL = "\u1100-\u11ff\ua960-\ua97c\uac00-\ud7fb"
# Thai, Lao, Tibetan, Burmese, Khmer, New Tai Lue, Tai Tham, Balinese, Javanese.
_ABUGIDA = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ecd\u0edc-\u0edf\u0f40-\u0fbc\u1000-\u103f\u1050-\u108f"
    "\u1780-\u17d3\u17d7\u17dc\u1980-\u19c9\u1a20-\u1a7c\u1b00-\u1b4c\ua980-\ua9c0"
)
_UNSPACED = _HAN + _KANA + _ABUGIDA
_DENSE = _UNSPACED + _HANGUL
_HAS_DENSE = re.compile(f"[{_DENSE}]")
_UNIT = re.compile(f"([{_HAN}])|([{_KANA}{_HANGUL}])|([{_ABUGIDA}])|[^\\s{_DENSE}]+")
# The weight of a letter of a word, and in the groups of _UNIT; a word weighs at most half of _FULL.
_WEIGHTS = (10, 12, 10, 5)
_FULL = 60
_RUN = re.compile(f"([{_HAN}{_KANA}]+|[{_HANGUL}]+)|([{_ABUGIDA}]+)|[^\\s{_DENSE}]+")
_TERM = (0, 2, 4)  # letters of a term in the groups of _RUN
_NO_BLANK = re.compile(f"(?<=[{_UNSPACED}]) | (?=[{_UNSPACED}])")

# Format characters that are seen: signs that enclose Arabic, Syriac and Kaithi numbers.
_SEEN = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd")
_FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\uffa0\ufff0-\ufff8"
_SELECTORS = "\ufe00-\ufe0f\U000e0100-\U000e01ef"
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
# Without the joiners: between two letters of a script that joins them they change what is read.
_FORMAT = re.compile(
    "[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-"
    "\U000e007f\u3164\uffa0]|^[\u200c\u200d]+|(?<=[\x00-\x7f])[\u200c\u200d]+|[\u200c\u200d]+"
    "(?=[\x00-\x7f]|$)"
)
_UNSEEN = re.compile(f"[{_FILLERS}{_SELECTORS}\u2800]")  # beyond what categories tell

# Spelling that differs while the word is the same: Arabic seats of hamza, final forms and Persian
# letters, Russian yo, Thai sara ae typed as two sara e.
_FOLDED = {
    **dict.fromkeys(map(ord, "\u0622\u0623\u0625\u0671"), "\u0627"),
    **dict.fromkeys(map(ord, "\u0649\u06cc"), "\u064a"),
    **{0x06A9: "\u0643", 0x0451: "\u0435"},
}
_OPTIONAL = re.compile(  # tatweel, Arabic and Hebrew vowel points
    "[\u0640\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed"
    "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7]"
)
_STRESS = re.compile("(?<=[\u0400-\u052f])[\u0300\u0301]")
_TONE_FIRST = re.compile("([\u0e48-\u0e4b])(\u0e4d)|([\u0ec8-\u0ecb])(\u0ecd)")

# Where words, or letters of unspaced scripts, begin and end: see `units`.
_WORD = re.compile(r"\S+")
_HAS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_VOWELS = "\u0e30\u0e32\u0e33\u0e45\u0eb0\u0eb2\u0eb3"  # of Thai and Lao, after their consonant
_LEADING = "\u0e40-\u0e44\u0ec0-\u0ec4"  # before it
_STACKING = "\u17d2\u1039\u1a60"  # Khmer, Burmese, Tai Tham: the next letter is written below
_MARKS = f"\u3099\u309a{_VOWELS}" + "".join(
    chr(point)
    for low, high in re.findall("(.)-(.)", _ABUGIDA)
    for point in range(ord(low), ord(high) + 1)
    if unicodedata.category(chr(point))[0] == "M"
)
_OPENING = r"(\[{\u3008\u300a\u300c\u300e\u3010\u3014\u3016\uff08\uff3b\uff5b\u00ab\u2018\u201c"
_LETTER = f"[{_LEADING}]*[{_UNSPACED}](?:[{_MARKS}]|(?<=[{_STACKING}])[{_UNSPACED}])*"
_SPAN_UNIT = re.compile(
    f"[{_OPENING}]*(?:{_LETTER}|[^\\s{_UNSPACED}{_OPENING}]+)(?:(?![{_OPENING}])[^\\w\\s])*|\\S"
)


class _Blanks(dict[int, "str | None"]):
    """Character -> its replacement in `normalise`; filled on demand."""

    def __missing__(self, point: int) -> str | None:
        sign = chr(point)
        kind = unicodedata.category(sign)
        to: str | None = _FOLDED.get(point, sign)
        if (kind == "Cf" and sign not in _SEEN) or _UNSEEN.match(sign) or _OPTIONAL.match(sign):
            to = None
        elif kind[0] in "PZ" or kind == "Cc":
            to = " "
        self[point] = to
        return to


class _Letters(dict[int, int]):
    """Character -> itself if it is a letter, a mark or a digit, else a space."""

    def __missing__(self, point: int) -> int:
        self[point] = point if unicodedata.category(chr(point))[0] in "LMN" else 32
        return self[point]


_BLANKS, _LETTERS = _Blanks(), _Letters()
_MARKS = "".join(
    chr(point)
    for first, last in re.findall("(.)-(.)", _ABUGIDA)
    for point in range(ord(first), ord(last) + 1)
    if unicodedata.category(chr(point))[0] == "M"
)
_TOKEN = re.compile(f"[{_HAN}]|[{_KANA}][\u3099\u309a]?|[{_ABUGIDA}][{_MARKS}]*|[^\\s{_UNSPACED}]+")
# As printed: with the punctuation of East Asia, which no blank parts from letters either.
_SIGN = re.compile(
    f"[{_HAN}]|[{_KANA}][\u3099\u309a]?|[{_ABUGIDA}][{_MARKS}]*|[\u3000-\u303f\uff00-\uff65]"
)


def visible(text: str) -> bool:
    """Return whether a text has anything but white space, control and format characters."""
    return any(_BLANKS[ord(sign)] not in (None, " ") or _is_printed(sign) for sign in text)


def _is_printed(sign: str) -> bool:
    """Return whether a character that `normalise` removes or replaces is printed nevertheless."""
    return unicodedata.category(sign)[0] in "PLM" and not _UNSEEN.match(sign)


def without_invisible(text: str) -> str:
    """Return a text without invisible characters.

    Control characters become spaces. Format characters (zero-width space, byte order mark, soft
    hyphen, direction marks, fillers) are removed, as are joiners at the ends of the text and beside
    ASCII. Joiners within Persian, Indic and other scripts and within emoji stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return _FORMAT.sub("", _CONTROLS.sub(" ", text))


@lru_cache(maxsize=64)  # a text is normalised once for its key and its shingles
def normalise(text: str) -> str:
    """Return the text as it is compared: equal texts differ at most in case, spacing, punctuation.

    It is NFKC, case-folded, without invisible characters, with one space for punctuation and white
    space, and without spaces beside letters of unspaced scripts. Symbols stay ("Na+" is not "Na").
    Arabic and Hebrew lose their vowel points, Arabic its tatweel and the variants of alef, yeh and
    kaf, Russian the dots of yo and stress marks; Thai and Lao marks are ordered. A text of
    punctuation alone stays as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    if folded.isascii():
        return " ".join(folded.translate(_BLANKS).split()) or folded
    folded = unicodedata.normalize("NFKC", folded)  # folding may leave what NFKC would join
    plain = _STRESS.sub("", folded).translate(_BLANKS)
    plain = _TONE_FIRST.sub(r"\2\1\4\3", plain).replace("\u0e40\u0e40", "\u0e41")
    return _NO_BLANK.sub("", " ".join(plain.split())) or folded


def key(text: str) -> bytes:
    """Return 16 bytes that identify `normalise(text)`: the same text has the same key."""
    return blake2b(normalise(text).encode(), digest_size=16).digest()


def shingles(text: str) -> set[str]:
    """Return the runs of the normalised text with the weight of two words, and its shorter ends.

    In scripts with spaces these are the pairs of adjacent words, with the ends counted as words.
    """
    plain = normalise(text)
    if plain.isascii() or not _HAS_DENSE.search(plain):
        return {f"{one} {other}" for one, other in pairwise(["", *plain.split(), ""])}
    matches = list(_UNIT.finditer(plain))
    units = [match[0] for match in matches]
    weights = [min(_FULL // 2, _WEIGHTS[match.lastindex or 0] * len(match[0])) for match in matches]
    runs: set[str] = set()
    end = weight = 0
    for start, own in enumerate(weights):
        while end < len(units) and weight < _FULL:
            weight += weights[end]
            end += 1
            if start == 0 and weight < _FULL:
                runs.add(f" {' '.join(units[:end])}")
        run = " ".join(units[start:end])
        runs.add(run if weight >= _FULL else f"{run} ")
        weight -= own
    return runs


def jaccard(one: set[str], other: set[str]) -> float:
    """Return the Jaccard index of two sets of shingles, 0 to 1."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


_kept_shingles = lru_cache(maxsize=1 << 14)(shingles)


def similarity(first: str, second: str) -> float:
    """Return the Jaccard index of the shingles of two texts, 0 to 1.

    Texts with at least `data.near_duplicate` are near duplicates. Recent shingles are kept.
    """
    return jaccard(_kept_shingles(first), _kept_shingles(second))


def words(text: str) -> list[str]:
    """Return the terms of the normalised text.

    These are its words and, in unspaced scripts, overlapping runs of letters: two in Chinese,
    Japanese and Korean, four in Thai and similar scripts.
    """
    plain = normalise(text)
    if plain.isascii():
        return plain.split()
    terms: list[str] = []
    for match in _RUN.finditer(plain):
        run, length = match[0], _TERM[match.lastindex or 0]
        if length:
            terms += [run[i : i + length] for i in range(max(1, len(run) - length + 1))]
        else:
            terms.append(run)
    return terms


def tokens(text: str) -> list[str]:
    """Return the words of a text, and the letters of unspaced scripts, for measures of overlap.

    Symbols are removed like punctuation; a text without letters and digits has no tokens. In ASCII
    text the tokens are the runs of letters and digits.
    """
    return _TOKEN.findall(normalise(text).translate(_LETTERS))


def spaced(text: str) -> str:
    """Return the text with spaces around each letter and sign of unspaced scripts."""
    return text if text.isascii() else " ".join(_SIGN.sub(r" \g<0> ", text).split())


def units(text: str) -> list[tuple[int, int]]:
    """Return (begin, end) of each word of a text as it is, at least one; spans are made of them.

    In unspaced scripts these are the letters with their marks: vowel signs and tones, and vowels
    that Thai and Lao write before their consonant, are not separated from it. Punctuation belongs
    to what it follows, opening brackets and quotation marks to what follows them.
    """
    found = _WORD if text.isascii() or not _HAS_UNSPACED.search(text) else _SPAN_UNIT
    return [match.span() for match in found.finditer(text)] or [(0, len(text))]


def letters(text: str) -> str:
    """Return the letters of the normalised text, with their marks."""
    return "".join(s for s in normalise(text) if s.isalpha() or unicodedata.category(s)[0] == "M")
