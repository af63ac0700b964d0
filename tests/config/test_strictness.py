"""Input means one thing or is refused: keys, numbers, nesting, paths, in files and overrides."""

from __future__ import annotations

import time
import typing
from pathlib import Path
from typing import Any

import annotated_types
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lbr_ds.config import RunConfig, load
from lbr_ds.config import ds_config as layout
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.plan.gpus import Gpu
from lbr_ds.shards import Manifest
from lbr_ds.system import resources
from lbr_ds.system.yaml_json import read_json, read_yaml
from lbr_ds.training.negatives import check_negatives
from tests.shards.server import serve
from tests.system.test_full_disks import command

DEMO = resources.find_shipped("recipes", "demo", ".yaml").read_text()


def parts(model: type[BaseModel]) -> set[type[BaseModel]]:
    """The model, and all models within it."""
    found = {model}
    for field in model.model_fields.values():
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in found:
                found |= parts(kind)
    return found


def bounds(annotation: Any, metadata: list[Any]) -> list[tuple[Any, set[str]]]:
    """(number type, which bounds it has) for each number that a value of the type may hold."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        flat = [m for one in more for m in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return bounds(inner, [*metadata, *flat])
    if annotation in (int, float):
        sides = {
            annotated_types.Ge: "low",
            annotated_types.Gt: "low",
            annotated_types.Le: "high",
            annotated_types.Lt: "high",
        }
        return [(annotation, {sides[type(m)] for m in metadata if type(m) in sides})]
    if typing.get_origin(annotation) is typing.Literal:
        return []
    return [found for kind in typing.get_args(annotation) for found in bounds(kind, metadata)]


def test_every_number_of_a_recipe_has_bounds_and_is_finite() -> None:
    open_ended, count = [], 0
    for model in parts(RunConfig) | {Gpu}:
        assert model.model_config["allow_inf_nan"] is False, model
        for name, field in model.model_fields.items():
            for _, sides in bounds(field.annotation, field.metadata):
                count += 1
                if sides != {"low", "high"}:
                    open_ended.append(f"{model.__name__}.{name}: {sides}")
    assert count > 50
    assert not open_ended


def bomb() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(lines)


RECIPES = {
    "a key twice": ("a: 1\nseed: 1\nseed: 2\n", r"r\.yaml:3: .*'seed' is given twice, .* line 2"),
    "an inner key twice": ("m: {a: 1, b: 2, a: 3}", "'a' is given twice"),
    "no whole number": ("seed: !!int abc", "'abc' is not a valid int"),
    "no date": ("seed: !!timestamp 2026-02-30", "'2026-02-30' is not a valid timestamp"),
    "many digits": (f"seed: {'9' * 5000}", "is not a valid int"),
    "deep": (f"seed: {'[' * 5000}{']' * 5000}", "nested more than 40 deep"),
    "deep and open": (f"seed: {'[' * 500_000}", "nested more than 40 deep"),
    "a bomb": (bomb(), r"r\.yaml:\d: .*aliases repeat more than 200000 values"),
    "in itself": ("a: &a [*a]", "an alias refers to a value that contains it"),
    "a list": ("- a", "a recipe must be a YAML mapping .* the file holds a list"),
    "no YAML": ("a: [", "not readable as YAML"),
    "a program": ("a: !!python/object/apply:os.getpid []", "not readable as YAML"),
    "large": ("#" * (5 << 20), "larger than 4 MiB"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_has_no_one_meaning(name: str, tmp_path: Path) -> None:
    text, words = RECIPES[name]
    (tmp_path / "r.yaml").write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigError, match=words) as caught:
        read_yaml(tmp_path / "r.yaml", "a recipe")
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert time.process_time() - began < 30  # a bomb would take for ever


def test_what_yaml_would_read_otherwise(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: 1e-4\nb: 2026-02-30\nc: '1e5'\nd: 1_0\ne: [1E+2, x1e2]\n")
    found = read_yaml(tmp_path / "r.yaml", "a recipe")
    assert found == {"a": 1e-4, "b": "2026-02-30", "c": "1e5", "d": 10, "e": [100.0, "x1e2"]}
    (tmp_path / "again.yaml").write_text(DEMO.replace("name: demo", "name: 2026-02-30"))
    run = load(tmp_path / "again.yaml")
    assert run.name == "2026-02-30"
    (tmp_path / "dumped.yaml").write_text(run.dump())
    assert load(tmp_path / "dumped.yaml") == run


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=-5", "seed: Input should be greater than or equal to 0"),
        (f"seed={2**64}", "seed: Input should be less than 4294967296"),
        ("stage1.optim.betas=[1.5,2]", "stage1.optim.betas.0: Input should be less than 1"),
        ("stage1.num_epochs=.inf", "stage1.num_epochs: Input should be a finite number"),
        ("engine.timeout_minutes=.inf", "engine.timeout_minutes: Input should be a finite number"),
        ("stage1.optim.lr=.nan", "stage1.optim.lr: Input should be a finite number"),
        ("stage1.optim.lr=1e999", "stage1.optim.lr: Input should be a finite number"),
        (
            "stage1.objective={ib_sft: .inf}",
            "stage1.objective.ib_sft: Input should be a finite number",
        ),
        ("stage2.temperature=-.inf", "stage2.temperature: Input should be a finite number"),
        ("mining.margin=.inf", "mining.margin: Input should be a finite number"),
        (f"seed={'9' * 5000}", "is not a valid int"),
        (f"seed={'[' * 5000}", "nested more than 40 deep"),
        ("data={a: 1, a: 2}", "'a' is given twice"),
        ("seed=true", "override 'seed=true': seed: is a boolean here"),
        ("lora.rank=on", "lora.rank: is a boolean here"),
        ("name=5", "name: Input should be a valid string; put it in quotes"),
        (f"name={'x' * 9999}", "name: String should have at most 200 characters"),
        ("a..b=1", "not of the form key.sub=value"),
        (
            "stage2={from: a, start_from: b, samples_per_step: 1, optim: {lr: 1}}",
            "from and start_from are the same key",
        ),
        ('engine.ds_config="a\\0b"', "engine.ds_config: holds a null character"),
        ("data.folder=http://[::1/x", "data.folder: not a valid URL"),
        ("data.sources=[{path: 'http://[::1/x'}]", "data.sources.0.path: not a valid URL"),
        ("data.sources=[{path: 'https://me:pass-ed/by@h/x'}]", "characters of a password as"),
        ("data.folder=~nobody-here/x", "no home folder is known for '~nobody-here'"),
    ],
)
def test_an_override_that_means_nothing(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("demo", [override])
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "pass-ed" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', "the key 'stage' is given twice"),
        ('{"zero_optimization": {"stage": 3, "sub_group_size": NaN}}', "NaN is not valid in JSON"),
        ('{"zero_optimization": {"stage": 3, "sub_group_size": 1e999}}', "1e999 is out of range"),
        (
            '{"zero_optimization": {"stage": 3, "sub_group_size": "many"}}',
            "cannot be read .*'many'",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": 5}}',
            "offload_param.device=5 is not supported",
        ),
        ('{"zero_optimization": 3}', "zero_optimization=3; make it an object"),
        ('{"zero_optimization": {"stage": true}}', "stage=True; use 1, 2 or 3"),
        ('{"a":' + "[" * 100_000, "not readable as JSON"),
    ],
)
def test_a_ds_config_that_means_nothing(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        layout.load(str(path))
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 600


def test_json_of_a_run_may_hold_what_python_writes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"loss": NaN}')
    assert read_json(tmp_path / "a.json", "metrics", DataError, strict=False)["loss"] != 0
    with pytest.raises(DataError, match="NaN"):
        read_json(tmp_path / "a.json", "metrics", DataError)


def test_the_home_folder_is_known_to_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a recipe, in an override and on the command line."""
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = {
        "run": "run",
        "data.folder": "data.folder",
        "model.backbone": "model.backbone",
        "mining.model": "mining.model",
        "mining.guide": "mining.guide",
        "engine.ds_config": "engine.ds_config",
        "stage2.from": "stage2.start_from",
    }
    run = load("demo", [f"{key}=~/x" for key in keys] + ["data.sources=[{path: ~/x}]"])
    for name in [*keys.values(), "data.sources"]:
        value: Any = run
        for step in name.split("."):
            value = getattr(value, step)
        found = value[0].path if isinstance(value, list) else value
        assert str(found) == str(tmp_path / "x"), name
    (tmp_path / "my.yaml").write_text(DEMO)
    for words in (["plan", "~/my.yaml", "--json", "~/a.json"], ["plan", "demo", "--json=~/b.json"]):
        assert command(*words, "--nodes", "1", "--gpus", "1") == (0, [])
    assert command("init", "~/new")[0] == 0
    assert (tmp_path / "a.json").is_file()
    assert (tmp_path / "b.json").is_file()
    assert (tmp_path / "new" / "recipes").is_dir()
    code, lines = command("report", "~/nowhere")
    assert code == 2
    assert str(tmp_path / "nowhere") in lines[0]


def test_a_source_behind_a_password_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lbr_ds.errors import EnvironmentProblem
    from lbr_ds.system.locate import locate

    monkeypatch.setenv("LBR_DS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jsonl").write_text("{}")
    with serve(tmp_path / "web") as server:
        server.password = "me:p@ss:word"
        url = f"{server.url}/a.jsonl"
        assert locate(url.replace("://", "://me:p%40ss%3Aword@")).read_text() == "{}"
        with pytest.raises(EnvironmentProblem) as caught:
            locate(url.replace("://", "://me:wrong-one@"))
    assert "wrong-one" not in str(caught.value)
    assert "/a.jsonl" in str(caught.value)


def test_stage_2_without_negatives_is_refused(tmp_path: Path) -> None:
    class Made(Manifest):
        def beside(self, name: str) -> bytes | None:
            return b'{"splits": {"cl": {"groups": 1, "components": 1}}}'

        def records(self, split: str) -> int:
            return 40

    made = Made(tmp_path, {}, [], 0, "", "")
    one = load("demo", ["stage2.samples_per_step=1"])
    with pytest.raises(ConfigError, match=r"samples_per_step=1 and .*num_negatives=0 leave no neg"):
        check_negatives(one, 2, made)
    with pytest.raises(DataError, match="split cl is one group of 40 records, so no query has a"):
        check_negatives(load("demo"), 2, made)
    check_negatives(one, 1, made)
    check_negatives(load("demo", ["stage2.num_negatives=2"]), 2, made)
