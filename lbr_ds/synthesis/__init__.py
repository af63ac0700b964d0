"""Plain passages of prepared data -> queries for them, written by a language model, in cl.

    from lbr_ds.synthesis.synthesize import synthesize
    audit = synthesize(run)

1. Each passage of cl (and gl) without a query is put into the prompt (`prompts.py`).
2. A server (`endpoint.py`) or a model in this process (`local.py`) answers; each answer is stored
   once (`answers.py`).
3. `rules.py` leaves out what is no good query, repeats another or resembles a held-out text, and
   `round_trip.py` what does not find its passage.
4. `mining.rewrite` puts the pairs into cl, and `leaks.prove_no_near_queries` counts again.

The only door for requests.
"""

from __future__ import annotations
