"""The figures of the paper (Learn Before Represent, arXiv 2601.11124), as its text gives them.

Columns are named as in the paper. Fractions (0.802) and percentages (80.60) are as printed. `note`
says what is missing from the available text or contradicts another table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperTable:
    """The figures of one table.

    Attributes:
        title: Of the table.
        columns: Their names.
        rows: {name: a value for each column; None where the paper has none}.
        per_cent: The columns that are scores times 100.
        ndcg: The columns that are N@10.
        note: What a reader must know.
    """

    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]
    per_cent: tuple[str, ...] = ()
    ndcg: tuple[str, ...] = ()
    note: str = ""

    def scores(self, row: str) -> dict[str, float]:
        """Return {column: figure} of a row, scores between 0 and 1; {} for an unknown row."""
        values = zip(self.columns, self.rows.get(row, ()), strict=False)
        return {c: v / 100 if c in self.per_cent else v for c, v in values if v is not None}


_DOMAINS = (
    "Chemistry R@10",
    "Chemistry N@10",
    "Medical R@10",
    "Medical N@10",
    "Code R@10",
    "Code N@10",
    "Avg.",
)

PAPER = {
    "table1": PaperTable(
        "Main results in the domains",
        _DOMAINS,
        {
            "Qwen2-1.5B": (0.100, 0.078, 0.410, 0.335, 0.151, 0.108, 20.0),
            "Qwen2.5-1.5B": (0.146, 0.115, 0.353, 0.286, 0.116, 0.081, 18.3),
            "ChemLLM": (0.237, 0.168, 0.034, 0.020, 0.116, 0.082, 11.0),
            "HuaTuo": (0.201, 0.188, 0.346, 0.283, 0.130, 0.101, 31.2),
            "BGE": (0.689, 0.557, 0.947, 0.871, 0.882, 0.754, 78.3),
            "GTE": (0.766, 0.677, 0.958, 0.867, 0.360, 0.286, 65.2),
            "LLM2Vec": (0.712, 0.615, 0.961, 0.890, 0.850, 0.729, 79.3),
            "SFT+CL Qwen2-1.5B": (0.449, 0.405, 0.732, 0.625, 0.888, 0.764, 64.4),
            "SFT+CL Qwen2.5-1.5B": (0.436, 0.391, 0.664, 0.558, 0.855, 0.732, 60.6),
            "LBR Llama3.2-1B": (0.722, 0.619, 0.976, 0.897, 0.979, 0.879, 84.5),
            "LBR Qwen2-1.5B": (0.802, 0.727, 0.978, 0.899, 0.978, 0.882, 87.8),
            "LBR Qwen2.5-1.5B": (0.797, 0.723, 0.979, 0.906, 0.980, 0.887, 87.9),
        },
        ndcg=("Chemistry N@10", "Medical N@10", "Code N@10"),
        note="150k samples for stage 1, 50k for stage 2, 20k held out, in each domain; Avg. in per "
        "cent. Two averages are not those of their rows: Qwen2's six give 19.7, HuaTuo's 20.8.",
    ),
    "table2": PaperTable(
        "Representation and generation",
        ("R@10", "N@10", "B-4", "R-L"),
        {
            "Base": (41.03, 26.68, 4.42, 23.71),
            "GL": (54.91, 45.98, 14.32, 35.79),
            "CL": (75.59, 64.35, None, None),
            "IB-GL": (90.33, 80.60, 13.98, 35.58),
        },
        per_cent=("R@10", "N@10"),
        ndcg=("N@10",),
        note="Medical, Qwen2-1.5B. Base's N@10 is 33.5 in Tables 1 and 3.",
    ),
    "table3": PaperTable(
        "The stages of LBR",
        ("Medical N@10", "Code N@10"),
        {
            "LLM": (33.52, 10.78),
            "LLM+GL": (45.98, 40.71),
            "LLM+IB-GL": (80.60, 73.31),
            "LLM+CL": (64.35, 76.91),
            "LLM+GL+CL": (62.45, 76.36),
            "LLM+IB-GL+CL": (89.85, 88.22),
        },
        per_cent=("Medical N@10", "Code N@10"),
        ndcg=("Medical N@10", "Code N@10"),
        note="Qwen2-1.5B. The measure is not named; the figures are those of Table 1's N@10.",
    ),
    "table4": PaperTable(
        "Causal or bidirectional attention in stage 2",
        ("as printed",),
        {
            "GL, causal CL": (54.91,),
            "GL, bidirectional CL": (55.04,),
            "IB-GL, causal CL": (75.59,),
            "IB-GL, bidirectional CL": (64.35,),
        },
        per_cent=("as printed",),
        note="Doubtful: 54.91, and 75.59 with 64.35, are in Table 2 too, as R@10 of GL and as "
        "R@10 and N@10 of CL.",
    ),
    "table5": PaperTable(
        "Compression ratio (stage 1 alone)",
        ("NDCG@10", "Recall@10"),
        {
            "row 1": (8.17, 10.65),
            "row 2": (10.84, 13.26),
            "row 3": (17.14, 20.66),
            "row 4": (18.75, 21.98),
            "row 5": (27.31, 30.09),
            "row 6": (20.97, 23.57),
        },
        per_cent=("NDCG@10", "Recall@10"),
        note="The ratios themselves are missing from the text at hand (and it speaks of five, not "
        "six), so no row of ours corresponds to a row of the paper. Ours are from mild to extreme, "
        "as the paper's text describes its own. The paper trained for 1,000 steps.",
    ),
    "table6": PaperTable(
        "Supervised pairs or plain passages in stage 1",
        ("Retrieval", "Training time"),
        {
            "Standard SFT": (45.98, 1.0),
            "IB-GL (SFT)": (80.60, 1.03),
            "Standard PT": (43.25, 1.0),
            "IB-GL (PT)": (81.36, 3.9),
        },
        per_cent=("Retrieval",),
        ndcg=("Retrieval",),
        note="Retrieval is N@10 on medicine (45.98 and 80.60 are those of Table 3). Time is "
        "relative to that of the standard form.",
    ),
    "figure3": PaperTable(
        "Data shared between the stages at a fixed budget",
        (),
        {},
        note="A drawing: the text gives no figures, but the shape (both curves rise, then fall) "
        "and the order (IB-GL above GL at every share). Its budget is 100k samples.",
    ),
    "counts": PaperTable(
        "Number of bottleneck tokens", (), {}, note="The paper gives ratios: see table5."
    ),
    "beyond": PaperTable(
        "Variants of LBR at equal samples", (), {}, note="The paper has no such table."
    ),
    "forgetting": PaperTable(
        "What stage 2 forgets of generating", (), {}, note="The paper has no such table."
    ),
    "bottleneck": PaperTable(
        "What of a gain is the bottleneck's", (), {}, note="The paper has no such table."
    ),
}
