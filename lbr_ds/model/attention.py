"""IB attention (paper, section 3.2) inside a transformers model, without a mask.

    use_ib_attention(model)                                 # any causal LM of transformers
    states = packed_forward(model, pack(sequences)).last_hidden_state[0]      # (T, D)

`ib_segments` (objectives/) has turned the rule "Y sees B and earlier Y, never X" into rows to
copy, so this file only runs attention inside each segment. It is registered as `lbr_ib` with
transformers' AttentionInterface, so any backbone that takes an attention interface works with no
copied model code; as no mask function has that name, transformers builds no mask either (5.23,
masking_utils._preprocess_mask_arguments).

The kernels are in `attention_kernels.py`. Which one is fastest depends on the batch, so it is
chosen once for each forward, from lengths that the host knows (`attention_costs.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from lbr_ds.batching import PackedBatch
from lbr_ds.errors import ConfigError
from lbr_ds.model.attention_calibration import Heads, calibrate
from lbr_ds.model.attention_costs import RECTANGLES, Kernels
from lbr_ds.model.attention_kernels import attend, check_window
from lbr_ds.model.opaque_attention import Attending, opaque_attention, token_of
from lbr_ds.objectives.ib_segments import Segments

NAME = "lbr_ib"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # kwargs by which a backbone changes scores


def use_ib_attention(model: PreTrainedModel) -> None:
    """Make a causal LM of transformers attend as `segments` say; see `packed_forward`."""
    model.set_attn_implementation(NAME)


def packed_forward(
    model: PreTrainedModel,
    batch: PackedBatch,
    *,
    bidirectional: bool = False,
    kernels: Kernels | None = None,
    **options: Any,
) -> Any:
    """Run the model's body, without its head, on a packed batch.

    Args:
        model: a causal LM after `use_ib_attention`.
        batch: what `lbr_ds.batching.pack` returns.
        bidirectional: let every row of a segment see the whole segment (a stage-2 baseline).
        kernels: the attention kernels to choose from; None: those that the device has, measured
            at their first use.
        **options: for the model's forward, such as `output_hidden_states`.

    Returns:
        transformers' output; its `last_hidden_state` is (1, T, D).
    """
    segments, heads = batch.segments, Heads.of(model.config)
    kernels = kernels or calibrate(batch.ids.device, model.dtype, heads)
    kernel = kernels.choose(segments, heads.width)
    return model.base_model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        segments=segments,
        kernel=kernel,
        attending=token_of(Attending(segments, kernel)),
        bidirectional=bidirectional,
        **{"use_cache": False, **options},
    )


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    kernel: str = RECTANGLES,
    attending: Tensor | None = None,
    bidirectional: bool = False,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend inside each segment; the function behind transformers' attention interface.

    Args:
        module: the attention module that calls.
        query: (1, H, T, d).
        key: (1, Hkv, T, d).
        value: (1, Hkv, T, d).
        attention_mask: ignored; transformers passes None.
        segments: which rows attend to each other.
        kernel: how, a name of `attention_kernels.KERNELS`.
        attending: both of these as a token, which a compiled layer needs.
        bidirectional: let every row of a segment see the whole segment (a stage-2 baseline).
        scaling: of the scores; None: 1 / sqrt(d).
        **kwargs: what else the backbone passes.

    Returns:
        (1, T, H, d), and None for the attention weights.

    Raises:
        ConfigError: the backbone's scores need more than a scale, or a segment exceeds its sliding
            window.
    """
    if segments is None:
        raise ConfigError(f"attention {NAME!r} was called without segments; use packed_forward")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"this backbone's attention uses {name}, which {NAME} does not support"
            )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, d)
    window, causal = kwargs.get("sliding_window"), not bidirectional
    if torch.compiler.is_compiling():
        record = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        out, _ = opaque_attention(q, k, v, attending, causal, scaling, window, record)
    else:
        check_window(segments, window)
        out = attend(q, k, v, segments, kernel, causal=causal, scale=scaling)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, segment_attention)
