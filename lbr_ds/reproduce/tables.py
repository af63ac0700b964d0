"""The paper's tables as values: which variants of a recipe are trained, and which are compared.

A variant is a name, overrides of the recipe, and the stages to run. Baselines without a bottleneck
have `bottleneck.count=0`: the plain backbone, whose embedding is the state of its end token, where
`plain_sft` was trained to begin an answer. That end token is itself a bottleneck of one token
without the cut; "paper's form" is plain fine-tuning without it, read at a text's last token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lbr_ds.config import RunConfig
from lbr_ds.errors import ConfigError

_PLAIN = ("bottleneck.count=0", "stage1.objective=plain_sft", "stage1.bag_of_words=0")
_PAPER_FORM = (*_PLAIN, "bottleneck.separator=none")
_LBR = "IB-GL+CL"
_BIDIRECTIONAL = ("model.attention=bidirectional",)
COUNTS = (32, 16, 8, 4, 2, 1)  # of bottleneck tokens
RATIOS = (2, 4, 8, 16, 32, 64)  # tokens of text for each: mild to extreme compression
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the budget that stage 1 gets


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        name: The name of the row.
        stages: The stages to train.
        learn: Overrides of the recipe for both stages.
        represent: Further overrides for stage 2 alone.
        data: Overrides of `prepare`, if the variant needs data of its own.
        model: The name of a published model, which is only scored.
        paper: The row of the paper's table to compare with.
        over: The variant by whose time for stage 1 that of this one is divided.
        share: The share of the budget in stage 1, figure 3's horizontal axis.
    """

    name: str
    stages: tuple[int, ...] = ()
    learn: tuple[str, ...] = ()
    represent: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    model: str = ""
    paper: str = ""
    over: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        variants: Its rows, in the paper's order.
        pairs: Names (a, b) of the variants to compare; a minus b is tested.
        generation: Whether generated answers are scored too.
    """

    variants: tuple[Variant, ...]
    pairs: tuple[tuple[str, str], ...]
    generation: bool = False


def _table1(run: RunConfig) -> Table:
    named = {
        "BM25": "bm25",
        "ChemLLM": "chemllm",
        "HuaTuo": "huatuo",
        "BGE": "bge",
        "GTE": "gte",
        "LLM2Vec": "llm2vec",
    }
    others = [Variant(k, model=v, paper="" if k == "BM25" else k) for k, v in named.items()]
    return Table(
        (
            Variant("LLM", (), _PLAIN, paper="Qwen2.5-1.5B"),
            *others,
            Variant("SFT+CL", (1, 2), _PLAIN, paper="SFT+CL Qwen2.5-1.5B"),
            Variant("LBR", (1, 2), paper="LBR Qwen2.5-1.5B"),
        ),
        tuple(("LBR", name) for name in ("LLM", *named, "SFT+CL")),
    )


def _table2(run: RunConfig) -> Table:
    return Table(
        (
            Variant("Base", (), _PLAIN, paper="Base"),
            Variant("GL", (1,), _PLAIN, paper="GL"),
            Variant("CL", (2,), _PLAIN, paper="CL"),
            Variant("IB-GL", (1,), paper="IB-GL"),
            Variant("LBR", (1, 2)),
        ),
        (("IB-GL", "GL"), ("IB-GL", "CL"), ("LBR", "CL"), ("LBR", "IB-GL")),
        generation=True,
    )


def _table3(run: RunConfig) -> Table:
    lbr = "LLM+IB-GL+CL"
    variants = (
        Variant("LLM", (), _PLAIN),
        Variant("LLM+GL", (1,), _PLAIN),
        Variant("LLM+IB-GL", (1,)),
        Variant("LLM+CL", (2,), _PLAIN),
        Variant("LLM+GL+CL", (1, 2), _PLAIN),
        Variant(lbr, (1, 2)),
    )
    stages = {"LLM": (), "LLM+GL": (1,), "LLM+CL": (2,), "LLM+GL+CL": (1, 2)}
    weak = [Variant(f"{n} (paper's form)", s, _PAPER_FORM, paper=n) for n, s in stages.items()]
    pairs = [(lbr, v.name) for v in variants if v.name != lbr]
    pairs += [(lbr, f"{name} (paper's form)") for name in ("LLM+CL", "LLM+GL+CL")]
    alike = [(f"LLM+GL+CL{form}", f"LLM+CL{form}") for form in ("", " (paper's form)")]
    return Table(
        (*map(_beside, variants), *weak),
        (*pairs, *alike, ("LLM+IB-GL", "LLM+GL"), ("LLM+IB-GL", "LLM+GL (paper's form)")),
    )


def _table4(run: RunConfig) -> Table:
    rows = [
        _beside(Variant(f"{name}, {attention} CL", (1, 2), learn, represent))
        for name, learn in (("GL", _PLAIN), ("IB-GL", ()))
        for attention, represent in (("causal", ()), ("bidirectional", _BIDIRECTIONAL))
    ]
    pairs = [(f"{name}, causal CL", f"{name}, bidirectional CL") for name in ("GL", "IB-GL")]
    return Table(tuple(rows), (*pairs, ("IB-GL, causal CL", "GL, causal CL")))


def _table5(run: RunConfig) -> Table:
    """Give a text of n tokens n / r bottleneck tokens; the cap is that of the longest text."""
    length = run.model.max_length
    rows = [
        Variant(f"r={r}", (1,), (f"bottleneck.count={cap}", f"bottleneck.ratio={r}"))
        for r in RATIOS
        for cap in [min(256, -(-length // (r + 1)))]
    ]
    names = [row.name for row in rows]
    return Table(tuple(rows), tuple(zip(names[1:], names[:-1], strict=True)))


def _counts(run: RunConfig) -> Table:
    """Return a table that the paper lacks: every text has the same number K of tokens."""
    fit = [k for k in COUNTS if 2 * k <= run.model.max_length]  # the text keeps half at least
    rows = [Variant(f"K={k}", (1,), (f"bottleneck.count={k}",)) for k in fit]
    names = [row.name for row in rows]
    return Table(tuple(rows), tuple(zip(names[1:], names[:-1], strict=True)))


def _table6(run: RunConfig) -> Table:
    plain, bottleneck = (_PLAIN[0], _PLAIN[2]), ()
    rows = (
        ("Standard SFT", plain, "plain_sft", "Standard SFT"),
        ("IB-GL (SFT)", bottleneck, "ib_sft", "Standard SFT"),
        ("Standard PT", plain, "plain_lm", "Standard PT"),
        ("IB-GL (PT)", bottleneck, "ib_reconstruct", "Standard PT"),
    )
    variants = [
        _beside(Variant(name, (1,), (*learn, f"stage1.objective={kind}"), over=over))
        for name, learn, kind, over in rows
    ]
    suffix = ("stage1.objective=ib_continue",)
    ours = Variant("IB-GL (PT, prefix to suffix)", (1,), suffix, over="Standard PT")
    return Table(
        (*variants, ours),
        (
            ("IB-GL (SFT)", "Standard SFT"),
            ("IB-GL (PT)", "Standard PT"),
            ("IB-GL (SFT)", "IB-GL (PT)"),
        ),
    )


def _bottleneck(run: RunConfig) -> Table:
    """Return a table that the paper lacks: what the bottleneck and the bag-of-words loss gain.

    uncut: the same sequences, but Y sees X too. BoW: with the bag-of-words loss.
    """
    objectives = {"uncut": "ib_uncut", "IB-GL": "ib_sft"}
    ways = {"GL": _PLAIN} | {
        f"{name}{words}": (f"stage1.objective={objective}", f"stage1.bag_of_words={weight}")
        for name, objective in objectives.items()
        for words, weight in (("", 0), ("+BoW", 1))
    }
    ways["IB-GL+BoW, mixed"] = (
        "stage1.objective={ib_sft: 1, ib_reconstruct: 1}",
        "stage1.bag_of_words=1",
    )
    rows = [Variant("CL", (2,))]
    rows += [Variant(name, (1,), learn) for name, learn in ways.items()]
    rows += [Variant(f"{name}+CL", (1, 2), learn) for name, learn in ways.items()]
    full = [f"{name}+CL" for name in ("IB-GL+BoW", "IB-GL+BoW, mixed")]
    pairs = [(a, b) for a in full for b in ("CL", "GL+CL", "uncut+BoW+CL", "IB-GL+CL")]
    cut = [(f"IB-GL{rest}", f"uncut{rest}") for rest in ("", "+BoW", "+CL")]
    return Table(tuple(rows), (*pairs, *cut))


def _beyond(run: RunConfig) -> Table:
    """Return a table that the paper lacks: variants of LBR, and CL with the samples of both stages.

    A sample of either stage is a query with its answer, so these rows have about as many tokens as
    LBR. They are left out where a stage is measured in epochs, and so is the one stage that trains
    both losses together.
    """
    alone = [Variant("CL", (2,), _PLAIN), *_longer(run)]
    rows = [
        *alone,
        Variant("GL+CL", (1, 2), _PLAIN),
        Variant(_LBR, (1, 2)),
        Variant(f"{_LBR}, r=8", (1, 2), ("bottleneck.ratio=8",)),
        *_together(run),
    ]
    pairs = [(_LBR, row.name) for row in rows if row.name != _LBR]
    pairs += [("GL+CL", row.name) for row in alone]
    return Table(tuple(rows), tuple(pairs))


def _forgetting(run: RunConfig) -> Table:
    """Return a table that the paper lacks: the answers that a model generates after stage 2.

    Replay reads a batch of stage 1 more in each step of stage 2 than the other rows.
    """
    replay = f"{_LBR}, replay 0.1"
    rows = [
        Variant("LLM"),
        Variant("IB-GL", (1,)),
        Variant(_LBR, (1, 2)),
        Variant(replay, (1, 2), ("stage2.generative=0.1",)),
        *_together(run),
    ]
    pairs = (("IB-GL", _LBR), *((row.name, _LBR) for row in rows[3:]))
    return Table(tuple(rows), pairs, generation=True)


def _steps_of_both(run: RunConfig) -> tuple[int, int] | None:
    """Return the steps of both stages; None if a stage is measured in epochs."""
    one, two = run.stage1.num_steps, run.stage2.num_steps
    return None if one is None or two is None else (one, two)


def _longer(run: RunConfig) -> list[Variant]:
    """Return CL with as many samples as both stages have, read at an end token or without one."""
    if not (steps := _steps_of_both(run)):
        return []
    more = -(-steps[0] * run.stage1.samples_per_step // run.stage2.samples_per_step)
    longer, name = f"stage2.num_steps={steps[1] + more}", "CL, samples of both stages"
    forms = {name: _PLAIN, f"{name} (paper's form)": _PAPER_FORM}
    return [Variant(row, (2,), (*form, longer)) for row, form in forms.items()]


def _together(run: RunConfig) -> list[Variant]:
    """Return the one stage that trains both losses, whose steps hold the samples of both stages."""
    if not (steps := _steps_of_both(run)):
        return []
    # A multiple of 8, so that the ranks can share it.
    batch = -(-steps[0] * run.stage1.samples_per_step // steps[1] // 8) * 8
    learn = ("stage2.generative=1", f"stage1.samples_per_step={batch}")
    return [Variant("IB-GL and CL in one stage", (2,), learn)]


def _figure3(run: RunConfig) -> Table:
    """Divide the records of gl and cl anew for each share; each is read once."""
    sizes = run.data.splits
    if run.data.protocol == "knowledge":
        raise ConfigError(
            "figure3 divides one budget between gl and cl; under data.protocol=knowledge gl has the"
            " facts and cl the pairs: use a recipe with protocol random"
        )
    budget = sizes.gl + sizes.cl
    once = [f"stage{n}.{key}" for n in (1, 2) for key in ("num_steps=null", "num_epochs=1")]
    rows = []
    for share in SHARES:
        gl, cl = budget * share, budget * (1 - share)
        if not sizes.are_shares:
            gl, cl = round(gl), round(cl)
        data = (
            f"data.folder={run.data.local_folder}-gl{round(100 * share)}",
            f"data.splits={{gl: {gl:.10g}, cl: {cl:.10g}, eval: {sizes.eval:.10g}}}",
        )
        rows += [
            Variant(f"{name}, {share:.0%} GL", (1, 2), (*learn, *once), data=data, share=share)
            for name, learn in (("GL+CL", _PLAIN), ("IB-GL+CL", ()))
        ]
    names = [row.name for row in rows]
    return Table(tuple(rows), tuple(zip(names[1::2], names[::2], strict=True)))


def _beside(variant: Variant) -> Variant:
    """Return the variant compared with the paper's row of the same name."""
    return Variant(**{**vars(variant), "paper": variant.name})


TABLES: dict[str, Callable[[RunConfig], Table]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "table5": _table5,
    "table6": _table6,
    "figure3": _figure3,
    "counts": _counts,
    "beyond": _beyond,
    "forgetting": _forgetting,
    "bottleneck": _bottleneck,
}
