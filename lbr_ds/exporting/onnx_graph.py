"""The exported model as ONNX: for onnxruntime, fastembed, and servers that load no safetensors.

| file | input_ids, attention_mask (N, L) -> |
|---|---|
| `onnx/model.onnx` | `last_hidden_state` (N, L, D) |
| `onnx/model_pooled.onnx` | `sentence_embedding` (N, D), pooled and of unit length |
| `onnx/model_int8.onnx` | `last_hidden_state`, by weights of 8 bits |

The first two share their weights, fp32 in `onnx/model.onnx_data`. Positions are counted from the
attention mask inside the graph, so that padding on either side gives the same vectors.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel

from lbr_ds.errors import ConfigError, EnvironmentProblem
from lbr_ds.model.bottleneck import Card, load_tokenizer
from lbr_ds.model.trust import SAFE

TOLERANCE = 1e-4  # largest difference of a component: other kernels than torch's, in fp32
_INPUTS = ["input_ids", "attention_mask"]
_NEEDED = ("onnx", "onnxruntime", "onnxscript")


def check_installed() -> None:
    """Raise EnvironmentProblem unless the packages of the extra `onnx` are installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"--onnx needs {', '.join(missing)}, not installed here; install lbr-ds with its extra "
            "`onnx`"
        )


def write_onnx(folder: Path, *, int8: bool) -> None:
    """Write the ONNX files of an exported folder.

    Args:
        folder: An exported folder, with its weights and tokenizer.
        int8: Whether to write `onnx/model_int8.onnx` too.

    Raises:
        ConfigError: The exporter cannot express the model.
    """
    (folder / "onnx").mkdir()
    file = folder / "onnx" / "model.onnx"
    _trace(folder, file)
    add_pooling(file, file.with_name("model_pooled.onnx"), Card.load(folder).pooling)
    if int8:
        from onnxruntime.quantization import quantize_dynamic

        # In a file of their own, because a graph file holds 2 GiB at most.
        target = file.with_name("model_int8.onnx")
        quantize_dynamic(file, target, use_external_data_format=True)


class _Body(nn.Module):
    """The base model, with positions that follow from the mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the final states (N, L, D)."""
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        states: Tensor = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return states


def _trace(folder: Path, file: Path) -> None:
    """Write the base model's graph, its weights in fp32 beside it."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    model = AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False, **SAFE
    )
    ids = torch.ones((2, 8), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    try:
        with _silenced():
            program = torch.onnx.export(
                _Body(model).eval(),
                (ids, mask),
                input_names=_INPUTS,
                output_names=["last_hidden_state"],
                dynamo=True,
                dynamic_shapes=(sizes, sizes),
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"torch.onnx cannot export this backbone ({why}); export without --onnx and --onnx-int8"
        ) from error
    assert program is not None
    graph: Any = program.model
    ClearMetadataAndDocStringPass()(graph)  # else every node names files of this machine
    onnx_ir.save(graph, file, external_data=f"{file.name}_data")


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Suppress warnings and output of the exporter."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def add_pooling(file: Path, pooled: Path, pooling: str) -> None:
    """Write a second graph over the same weights, which pools and normalises.

    Args:
        file: The graph that gives states.
        pooled: The graph to write, beside it.
        pooling: "last" or "mean".
    """
    import onnx
    from onnx import TensorProto
    from onnx.helper import make_node, make_tensor, make_tensor_value_info

    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    width = graph.output[0].type.tensor_type.shape.dim[2].dim_value
    if pooling == "mean":  # the sum has the direction of the mean, and the length is made one
        graph.initializer.extend(
            make_tensor(f"pool_axis_{axis}", TensorProto.INT64, [1], [axis]) for axis in (1, 2)
        )
        graph.node.extend(
            [
                make_node("Cast", ["attention_mask"], ["pool_mask"], to=TensorProto.FLOAT),
                make_node("Unsqueeze", ["pool_mask", "pool_axis_2"], ["pool_weights"]),
                make_node("Mul", ["last_hidden_state", "pool_weights"], ["pool_states"]),
                make_node("ReduceSum", ["pool_states", "pool_axis_1"], ["pooled"], keepdims=0),
            ]
        )
    else:
        graph.node.extend(
            [
                make_node("Cast", ["attention_mask"], ["pool_mask"], to=TensorProto.INT32),
                make_node("ArgMax", ["pool_mask"], ["pool_last"], axis=1, select_last_index=1),
                make_node("GatherND", ["last_hidden_state", "pool_last"], ["pooled"], batch_dims=1),
            ]
        )
    graph.node.append(make_node("LpNormalization", ["pooled"], ["sentence_embedding"], axis=1))
    del graph.output[:]
    graph.output.append(
        make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", width])
    )
    onnx.save(model, pooled)


def prove_onnx(folder: Path, texts: list[str], vectors: np.ndarray) -> dict[str, Any]:
    """Encode the texts by onnxruntime from an exported folder.

    Args:
        folder: The exported folder, with its `onnx/`.
        texts: N texts.
        vectors: Their vectors (N, D) by the trainer's encoder.

    Returns:
        For parity.json: `largest_difference` of a component and its `limit`; with 8-bit weights
        also `int8_least_cosine` and `int8_mean_cosine` between its vectors and the trainer's.

    Raises:
        ConfigError: The vectors differ by more than the limit.
    """
    pooling = Card.load(folder).pooling
    pooled = _Session(folder, "model_pooled.onnx")
    sizes = (1, 3, len(texts))  # alone, in mixed batches, all together
    found = [pooled.encode(texts, size) for size in sizes]
    found.append(_Session(folder, "model.onnx").encode(texts, 3, pooling))
    largest = float(np.max([np.abs(one - vectors).max() for one in found]))
    if not largest <= TOLERANCE:  # also when it is NaN
        raise ConfigError(
            f"the ONNX model's vectors differ from the trainer's by {largest:.2e} (limit "
            f"{TOLERANCE:.0e}); export without --onnx and --onnx-int8"
        )
    proof = {"largest_difference": largest, "limit": TOLERANCE}
    if (folder / "onnx" / "model_int8.onnx").exists():
        ours = _Session(folder, "model_int8.onnx").encode(texts, 3, pooling)
        cosines = (ours * vectors).sum(1)
        proof |= {
            "int8_least_cosine": float(cosines.min()),
            "int8_mean_cosine": float(cosines.mean()),
        }
    return proof


class _Session:
    """One of the graphs in onnxruntime, on the CPU, with the folder's tokenizer."""

    def __init__(self, folder: Path, name: str) -> None:
        import onnxruntime

        self.tokenizer = load_tokenizer(folder)
        self.session = onnxruntime.InferenceSession(
            folder / "onnx" / name, providers=["CPUExecutionProvider"]
        )

    def encode(self, texts: list[str], batch_size: int, pooling: str | None = None) -> np.ndarray:
        """(N, D) of unit length; pooling: "last" or "mean", for a graph that gives states."""
        return np.concatenate(
            [
                self._batch(texts[start : start + batch_size], pooling)
                for start in range(0, len(texts), batch_size)
            ]
        )

    def _batch(self, texts: list[str], pooling: str | None) -> np.ndarray:
        batch: Any = self.tokenizer(texts, padding=True, truncation=True, return_tensors="np")
        mask = batch["attention_mask"]
        (found,) = self.session.run(None, {name: batch[name] for name in _INPUTS})
        if pooling == "mean":
            found = (found * mask[..., None]).sum(1)
        elif pooling == "last":
            found = found[np.arange(len(found)), mask.sum(1) - 1]
        vectors: np.ndarray = found / np.linalg.norm(found, axis=1, keepdims=True)
        return vectors
