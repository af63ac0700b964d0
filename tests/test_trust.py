"""Nothing from others is run, and no secret is written down."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lbr_ds.config import BottleneckConfig, ModelConfig, load
from lbr_ds.encoder import Encoder
from lbr_ds.errors import ConfigError, LbrError
from lbr_ds.evaluation.models import _runs_own_code, load_model
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.system import environment
from tests.ranks import run_cli
from tests.shards.server import serve
from tests.test_layers import modules
from tests.tiny import backbone, tiny_recipe


class Planted:
    """Unpickled, it leaves a file."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (Path.touch, (self.sign,))  # type: ignore[return-value]


def pickled(folder: Path, sign: Path) -> Path:
    """A backbone whose weights are only there as a pickle, with something planted in it."""
    weights = load_file(backbone(folder) / "model.safetensors")
    torch.save({**weights, "planted": Planted(sign)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def pickled_layer(folder: Path, sign: Path) -> Path:
    """A sentence-transformers folder: sound but for a dense layer's pickle."""
    backbone(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    types = "sentence_transformers.models"
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"{types}.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    for path, config in (
        ("1_Pooling", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}),
        (
            "2_Dense",
            {
                "in_features": 32,
                "out_features": 8,
                "bias": True,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
        ),
    ):
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(config))
    torch.save({"linear.weight": Planted(sign)}, folder / "2_Dense" / "pytorch_model.bin")
    return folder


def own_code(folder: Path, sign: Path) -> Path:
    """A backbone whose config asks for a module of its own."""
    path = backbone(folder) / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "model_type": "planted",
        "auto_map": {
            "AutoConfig": "evil.Config",
            "AutoModelForCausalLM": "evil.Model",
            "AutoModel": "evil.Model",
        },
    }
    path.write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(sign)!r}, 'w').close()\n")
    return folder


def as_backbone(folder: Path) -> None:
    model = ModelConfig(backbone=str(folder))
    prepare_backbone(model, BottleneckConfig(), folder.with_name("prepared"), 0)


def as_scored(folder: Path) -> None:
    load_model(str(folder))


def as_miner(folder: Path) -> None:
    Encoder(str(folder)).encode(["a"], "query")


@pytest.mark.parametrize("use", [as_backbone, as_scored, as_miner])
@pytest.mark.parametrize("make", [pickled, pickled_layer, own_code])
def test_models_of_others_run_nothing(
    tmp_path: Path, make: Callable[[Path, Path], Path], use: Callable[[Path], None]
) -> None:
    if (make, use) == (pickled_layer, as_backbone):
        pytest.skip("a backbone has no such layers")
    sign = tmp_path / "was-run"
    folder = make(tmp_path / "model", sign)
    with pytest.raises(LbrError) as caught:
        use(folder)
    assert not sign.exists()
    words = {own_code: "trust_remote_code", pickled_layer: "pickle"}.get(make, "safetensors")
    assert words in str(caught.value)


def test_loaders_that_trust_by_default_are_known() -> None:
    def quiet(name: str, trust_remote_code: bool = False) -> None: ...
    def loud(name: str, trust_remote_code: bool = True) -> None: ...

    for loader, wanted in ((quiet, False), (loud, True)):
        meta: Any = SimpleNamespace(loader_kwargs={}, loader=loader)
        assert _runs_own_code(meta) is wanted


@pytest.mark.parametrize("place", ["recipe", "override"])
def test_yaml_makes_nothing_but_plain_values(tmp_path: Path, place: str) -> None:
    sign = tmp_path / "was-run"
    text = f"!!python/object/apply:os.mkdir [{sign}]"
    recipe = tiny_recipe(tmp_path, prepared=False)
    if place == "recipe":
        recipe.write_text(recipe.read_text() + f"\nseed: {text}\n")
    with pytest.raises(ConfigError, match="YAML"):
        load(recipe, [f"seed={text}"] if place == "override" else [])
    assert not sign.exists()


FORBIDDEN = {
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "yaml.load",
    "yaml.unsafe_load",
    "eval",
    "exec",
    "np.load",
    "torch.load",
}
# Its folders are closed to other users, and it refuses others (tests/corpora/test_engine.py).
KNOWN = {("engine.py", "pickle.load")}
SAFE_WORDS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def test_no_call_that_runs_what_it_reads() -> None:
    wrong = []
    for path, tree in modules():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            words = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            key, value = SAFE_WORDS.get(name, ("", None))
            safe = (path.name, name) in KNOWN or (key and words.get(key) is value)
            if name in FORBIDDEN and not safe:
                wrong.append(f"{path.name}:{node.lineno} {name}")
            if words.get("shell") or name.endswith((".extractall", ".extract")):
                wrong.append(f"{path.name}:{node.lineno} {name}")
    assert not wrong


LOADERS = {
    "from_pretrained",
    "from_config",
    "load_dataset",
    "SentenceTransformer",
    "CrossEncoder",
    "pipeline",
    "hf_hub_load",
    "load_metric",
    "load_model",
}
# Numbers and names alone; BM25, which counts words.
NO_CODE = {"GenerationConfig.from_pretrained", "self.mteb_model_meta.load_model"}


def test_every_loader_is_told_whether_code_of_others_may_run() -> None:
    """By a word of its own, or by a mapping of the same file that has it."""
    wrong, seen = [], 0
    for path, tree in modules():
        given = {
            target.id
            for node in ast.walk(tree)
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
            and "trust_remote_code" in [getattr(key, "value", None) for key in node.value.keys]
        }
        for node in ast.walk(tree):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.split(".")[-1] not in LOADERS or name in NO_CODE:
                continue
            seen += 1
            assert isinstance(node, ast.Call)
            words = {word.arg or ast.unparse(word.value) for word in node.keywords}
            if not words & {"trust_remote_code", "_trust(meta, trust_remote_code)", *given}:
                wrong.append(f"{path.name}:{node.lineno} {name}")
    assert seen > 20
    assert not wrong


PASSWORD = "open-sesame"


@pytest.mark.slow
def test_no_secret_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data behind a password, a source with another, a token in the environment and the script."""
    source = f"https://me:{PASSWORD}@127.0.0.1:9/corpus.jsonl?signature={PASSWORD}"
    recipe = tiny_recipe(tmp_path / "run-it")
    plain = yaml.safe_load(recipe.read_text())
    plain["data"]["sources"] = [{"path": source}]
    recipe.write_text(yaml.safe_dump(plain))
    script = tmp_path / "job.sbatch"
    script.write_text(f"#!/bin/bash\nexport HF_TOKEN={PASSWORD}\nlbr-ds train\n")
    with serve(tmp_path / "run-it" / "data") as server:
        server.password = f"me:{PASSWORD}"
        url = server.url.replace("://", f"://me:{PASSWORD}@")
        done = run_cli(
            "train",
            str(recipe),
            "--stage",
            "1",
            "--nproc",
            "1",
            "stage1.num_steps=2",
            f"data.folder={url}",
            HF_TOKEN=PASSWORD,
            LBR_SUBMIT_SCRIPT=str(script),
            LBR_DS_CACHE=str(tmp_path / "cache"),
        )
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "run-it" / "run"
    shutil.rmtree(folder / "backbone")
    written = [p for p in folder.rglob("*") if p.is_file()]
    assert {"recipe.yaml", "environment.json", "submit.sbatch", "state.json"} <= {
        p.name for p in written
    }
    assert not [p for p in written if PASSWORD.encode() in p.read_bytes()]
    failed = run_cli("prepare", str(recipe), f"data.folder={tmp_path / 'new'}")
    assert failed.returncode == 6, failed.stderr
    assert "127.0.0.1:9/corpus.jsonl" in failed.stderr
    for text in (done.stderr, done.stdout, failed.stderr, failed.stdout):
        assert PASSWORD not in text
    monkeypatch.setenv("HF_TOKEN", PASSWORD)
    assert PASSWORD not in json.dumps(environment.describe())
