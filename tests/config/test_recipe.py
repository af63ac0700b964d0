"""Every shipped recipe and ds_config loads; what is wrong is named in one line with the cure."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lbr_ds.config import load
from lbr_ds.config.ds_config import OWNED_BY_RECIPE
from lbr_ds.config.mixing import Mixing
from lbr_ds.errors import ConfigError
from lbr_ds.system import resources
from lbr_ds.training.deepspeed.engine import load_layout

RECIPES = sorted(p.stem for p in resources.shipped_folder("recipes").glob("*.yaml"))
DS_CONFIGS = sorted(p.stem for p in resources.shipped_folder("ds_configs").glob("*.json"))


def test_the_promised_files_are_there() -> None:
    assert {
        "demo",
        "medical-1.5b",
        "chemistry-1.5b",
        "code-1.5b",
        "llama3.2-1b",
        "huatuo-7b",
    } <= set(RECIPES)
    assert set(DS_CONFIGS) == {
        "zero1",
        "zero1_cpu",
        "zero2",
        "zero3",
        "zero3_cpu",
        "zero3_offload",
        "zero3_offload_params",
        "zero3_zeropp",
    }


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_loads_and_survives_its_own_dump(name: str, tmp_path: Path) -> None:
    run = load(name)
    (tmp_path / "again.yaml").write_text(run.dump())
    assert load(tmp_path / "again.yaml") == run
    load_layout(run.engine.ds_config)


@pytest.mark.parametrize("name", DS_CONFIGS)
def test_ds_config_loads(name: str) -> None:
    assert load_layout(name).stage in (1, 2, 3)


@pytest.mark.parametrize("name", DS_CONFIGS)
def test_what_no_rank_could_do_is_said_beforehand(name: str) -> None:
    """Quantised traffic without GPUs, and a second copy that the ranks cannot share evenly."""
    layout = load_layout(name)
    on_cpus, on_gpus = layout.unfit(2, gpus=False), layout.unfit(12, gpus=True)
    if name == "zero3_zeropp":
        assert "needs GPUs" in str(on_cpus)
        assert on_gpus == "zero_hpz_partition_size=8 does not divide 12 ranks"
    else:
        assert on_cpus is on_gpus is None
    assert layout.unfit(4, gpus=True) is None  # DeepSpeed cuts groups of 8 down to 4 ranks


@pytest.mark.parametrize("key", OWNED_BY_RECIPE)
def test_ds_config_may_not_own_a_key_of_the_recipe(key: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(f'{{"{key}": 1, "zero_optimization": {{"stage": 3}}}}')
    with pytest.raises(ConfigError, match=f"{key} belongs to the recipe; remove it and set"):
        load_layout(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "a JSON object, not list"),
        ("{}", "stage=None; use 1, 2 or 3"),
        (
            '{"zero_optimization": {"stage": 3}, "fp16": {"enabled": true}}',
            r"use bf16, or on GPUs without it \(V100, T4\) fp32: a copy of the ds_config zero2",
        ),
        (
            '{"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}',
            "grad_accum_dtype=fp32 needs zero_optimization.stage 2 or 3",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            r"mine\.json: zero_optimization\.offload_param\.device=nvme is not supported, .+ cpu",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}',
            "zero_optimization.offload_optimizer.device=nvme is not supported",
        ),
    ],
)
def test_broken_ds_config(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_layout(str(path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.x=1", "unknown key modle; did you mean 'model'?"),
        ("stage1.optim.lrr=1", "unknown key stage1.optim.lrr; did you mean 'lr'?"),
        ("stage2.form=last", "unknown key stage2.form; did you mean 'from'?"),
        ("data.sources=[{pth: x}]", "missing key data.sources.0.path"),
        ("stage1.objective=ib_sfd", "unknown objective 'ib_sfd'; did you mean 'ib_sft'?"),
        (
            "stage1.objective={ib_sft: 0}",
            "stage1.objective.ib_sft: Input should be greater than 0 (got 0)",
        ),
        ("stage1.num_epochs=2", "exactly one of num_steps and num_epochs"),
        ("bottleneck.count=0", "stage1.objective 'ib_sft' needs a bottleneck"),
        ("model.max_length=8 bottleneck.count=7", "leaves no room for text"),
        ("data.splits={gl: 0.9, cl: 0.9, eval: 0.1}", "add up to 1.9"),
        ("data.splits={gl: 100, cl: 0.5, eval: 5}", "mixes shares and counts"),
        ("model.max_length=many", "model.max_length"),
        ("stage2.chunk_tokens=9999", "chunk_tokens=9999 exceeds micro_batch_tokens=4096"),
        ("lora.rank=0", "lora.rank"),
        ("seed", "not of the form key.sub=value"),
        ("every.evaluate=0", "every.evaluate"),
        ("every.evaluate=often", "every.evaluate"),
        ("evaluation.max_queries=0", "evaluation.max_queries"),
        ("seed.x=1", "seed is a list or a single value"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    overrides = (
        override.split(" ") if "data" not in override and "{" not in override else [override]
    )
    with pytest.raises(ConfigError) as caught:
        load("demo", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no file .dmeo.; .*demo"):
        load("dmeo")


def test_overrides_read_numbers_as_people_write_them() -> None:
    run = load(
        "demo", ["stage1.optim.lr=1e-5", "stage2.from=backbone", "stage1.objective=plain_lm"]
    )
    assert run.stage1.optim.lr == 1e-5
    assert run.stage2.start_from == "backbone"
    assert run.stage1.objective == {"plain_lm": 1.0}
    assert load("demo", ["stage2.from=500"]).stage2.start_from == "500"


def test_result_settings_move_with_the_numbers_and_only_with_them() -> None:
    base = load("demo").result_settings(1)
    same = [
        "run=elsewhere",
        "every.save=7",
        "every.evaluate=null",
        "evaluation.max_queries=3",
        "stage1.micro_batch_tokens=99",
        "stage2.num_steps=5",
        "data.workers=0",
        "model.activation_checkpointing=true",
        "lora.alpha=8",
    ]
    other = [
        "seed=1",
        "stage1.num_steps=7",
        "stage1.optim.lr=1",
        "bottleneck.count=2",
        "model.num_layers=1",
        "lora.rank=4",
    ]
    assert all(load("demo", [o]).result_settings(1) == base for o in same)
    assert all(load("demo", [o]).result_settings(1) != base for o in other)
    base = load("demo").result_settings(2)
    assert load("demo", ["stage2.chunk_tokens=99"]).result_settings(2) == base
    assert load("demo", ["stage2.false_negative_margin=0.1"]).result_settings(2) != base
    assert load("demo", [SOURCES.format("license: CC0")]).result_settings(2) == base


SOURCES = "data.sources=[{{path: a, name: a, {}}}, {{path: b}}]"


def test_how_sources_are_drawn_is_part_of_the_result() -> None:
    plain, weighed, warmer = (
        load("demo", [SOURCES.format(key)])
        for key in ("license: CC0", "weight: 2", "temperature: 1")
    )
    assert plain.mixing(1) is plain.mixing(2) is None
    assert weighed.mixing(1) == weighed.mixing(2) == Mixing({"a": 2.0})
    assert weighed.result_settings(1)["data"] == {"weights": {"a": 2.0}, "size_exponent": 1}
    assert warmer.result_settings(1) == plain.result_settings(1)
    assert warmer.result_settings(2) != plain.result_settings(2)
    flat = load("demo", ["data.size_exponent=0.5", "stage2.homogeneous=true"])
    assert flat.mixing(1) == Mixing({}, 0.5)
    assert flat.mixing(2) == Mixing({}, 0.5, True)
    alike = load("demo", ["stage2.homogeneous=true"])
    assert alike.mixing(1) is None
    assert alike.separates_sources


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ("[{path: a, weight: 2}]", "weight is applied .* add a name"),
        ("[{path: a, temperature: 2}]", "temperature is applied .* add a name"),
        ("[{path: a, name: x, weight: 2}, {path: b, name: x}]", "'x' and differ in weight"),
        ("[{path: a, name: x, weight: 0}]", "weight: .*greater than 0"),
    ],
)
def test_a_weight_that_means_nothing(sources: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load("demo", [f"data.sources={sources}"])


def test_epochs_become_steps() -> None:
    plain = yaml.safe_load(load("demo").dump())
    assert plain["stage1"]["num_steps"] is not None
    run = load("demo", ["stage1.num_steps=null", "stage1.num_epochs=1.5"])
    assert run.stage1.steps(6400) == 300
