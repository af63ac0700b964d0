"""mteb's BM25 baseline, with words that fit the language of each task.

| languages of the task                             | words                                  |
|---------------------------------------------------|----------------------------------------|
| one, in a script with blanks and without marks    | mteb's, its stemmer and stop words     |
| (Latin, Cyrillic, Greek, Armenian, Georgian)      |                                        |
| unknown or several, in these scripts              | mteb's for English                     |
| any other                                         | `segmentation.words`; stems if there is |
|                                                   | one language with a Snowball stemmer   |

mteb cuts Chinese, Japanese, Korean and Thai into single characters, and its pattern for words
breaks Devanagari and other scripts at their vowel signs.
"""

from __future__ import annotations

from typing import Any

import Stemmer
from mteb.models import ModelMeta

from lbr_ds.corpora.curate.segmentation import words

_SPACED = {"Latn", "Cyrl", "Grek", "Armn", "Geor"}
_STEMMERS = {"ara": "arabic", "hin": "hindi", "nep": "nepali", "tam": "tamil", "yid": "yiddish"}


class Bm25:
    """A search of mteb's kind; `meta` is that of mteb's own baseline, which does the work."""

    def __init__(self, meta: ModelMeta) -> None:
        self.mteb_model_meta = meta

    def index(self, corpus: Any, *, task_metadata: Any, hf_subset: str, **options: Any) -> None:
        """Index the documents of a task."""
        langs = task_metadata.eval_langs
        own = langs.get(hf_subset, []) if isinstance(langs, dict) else langs
        search: Any = self.mteb_model_meta.load_model(**word_options(own))
        self._search = search
        search.index(corpus, task_metadata=task_metadata, hf_subset=hf_subset, **options)

    def search(self, queries: Any, **options: Any) -> Any:
        """{query id: {document id: score}} of the documents that were indexed last."""
        return self._search.search(queries, **options)


def word_options(eval_langs: list[str]) -> dict[str, Any]:
    """How mteb's BM25 is to cut the texts of these languages (`zho-Hans`)."""
    codes = [code.split("-") for code in eval_langs]
    languages, scripts = {language for language, _ in codes}, {script for _, script in codes}
    language = languages.pop() if len(languages) == 1 else "und"
    if scripts <= _SPACED:
        english = {"stopwords": "en", "stemmer_language": "english"}
        return english if language == "und" else {}
    if language not in _STEMMERS:
        return {"tokenizer": words}
    stem = Stemmer.Stemmer(_STEMMERS[language]).stemWords
    return {"tokenizer": lambda text: stem(words(text))}
