"""Take Python work out of ZeRO-3's hooks; what is computed and communicated stays the same.

DeepSpeed 0.19 does per layer, forward and backward: it walks the layer's modules for its
parameters about thirty times, builds messages that are not printed, binds the signature of autograd
functions, and replaces `F.linear` in the whole process. `make_lean` replaces these parts on the
engine's own modules. `lbr-ds bench host` measures it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lbr_ds.training.deepspeed.library import deepspeed

_zero = deepspeed.runtime.zero
_TALKING = (
    _zero.parameter_offload,
    _zero.partition_parameters,
    _zero.partitioned_param_coordinator,
    _zero.stage3,
)
_say = _zero.partition_parameters.print_rank_0
_AVAILABLE = _zero.partition_parameters.ZeroParamStatus.AVAILABLE
_RELEASE = "_PartitionedParameterCoordinator__release_param"
_ADD = "_DeepSpeedZeroOptimizer_Stage3__add_grad_to_ipg_bucket"
_NUM_AVAILABLE = "_PartitionedParameterCoordinator__n_available_params"


class ShardedLinear(nn.Linear):
    """A linear module whose graph holds its weight as a parameter, so that it can be released.

    The graph of `F.linear` holds a transposed view, which keeps a gathered weight in memory until
    the backward. DeepSpeed's own answer, `memory_efficient_linear`, gives the same results at
    several times the host's time, and replaces `F.linear` for everything in the process.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        y: Tensor = _Linear.apply(x, self.weight, self.bias)
        return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        for_x = None
        if need_x:
            # The second forward of activation checkpointing releases its weights (DeepSpeed).
            absent = weight.numel() == 0 and weight.ds_numel > 0
            if absent:
                weight.all_gather()
            for_x = slope @ weight
            if absent:
                weight.partition()
        rows = slope.reshape(-1, slope.shape[-1])
        for_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None
        return for_x, for_weight, rows.sum(0) if need_bias else None


def use_sharded_linear(model: nn.Module) -> None:
    """Make all plain linear modules of a model `ShardedLinear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ShardedLinear


def make_lean(model: nn.Module, optimizer: Any, hpz: int) -> None:
    """Replace the slow parts of DeepSpeed's hooks on a model.

    Args:
        model: the engine's module, with its hooks.
        optimizer: DeepSpeed's ZeRO-3 optimizer of that module.
        hpz: ranks that share a second copy of the parameters (ZeRO++); 1: there is none.
    """
    offload = optimizer.parameter_offload
    deepspeed.utils.nvtx.enable_nvtx = False
    for module in _TALKING:
        module.print_rank_0 = _say_if_forced
    if torch.cuda.is_available():
        _order_on_device(optimizer.reduce_and_partition_stream)
    if hpz == 1 and hasattr(offload.param_coordinator, _RELEASE):
        setattr(offload.param_coordinator, _RELEASE, _release(offload.param_coordinator))
    plain = optimizer.contiguous_gradients and not getattr(offload, "zenflow", False)
    if plain and hasattr(optimizer, _ADD):
        setattr(optimizer, _ADD, _add_to_bucket(optimizer))
    for part in model.modules():
        if "pre_bwd_fn" in part.__dict__:
            part.named_parameters = _remembered(part)  # type: ignore[method-assign]
            part.pre_bwd_fn, part.post_bwd_fn = _backward_hooks(part, offload)
        else:
            part._parameters = _unobserved(part)
    model.modules = _remembered_modules(model)  # type: ignore[method-assign]


def _say_if_forced(message: str, debug: bool = False, force: bool = False) -> None:
    """Stand for `print_rank_0`, which asks for the rank before it decides not to print."""
    if debug or force:
        _say(message, debug, force)


def _order_on_device(stream: Any) -> None:
    """Make what follows `stream.synchronize()` wait on the device, and not the host.

    DeepSpeed calls it after every micro-batch, before gradients are used that the stream reduces.
    """

    def synchronize() -> None:
        torch.cuda.current_stream().wait_stream(stream)

    with contextlib.suppress(AttributeError):  # a stream that takes no attributes stays as it is
        stream.synchronize = synchronize


def _release(coordinator: Any) -> Callable[..., None]:
    """Return what releases one gathered parameter, without the messages of the way there."""

    def release(parameter: Any, free_data: bool = True) -> None:
        if parameter.ds_status is _AVAILABLE and not parameter.ds_active_sub_modules:
            _zero.partition_parameters.free_param(parameter)
            left = getattr(coordinator, _NUM_AVAILABLE) - parameter.ds_numel
            setattr(coordinator, _NUM_AVAILABLE, left)

    return release


def _remembered(module: nn.Module) -> Callable[..., Iterator[tuple[str, nn.Parameter]]]:
    """Return `named_parameters` of a module, which walks its modules once: they stay the same."""
    walk = module.named_parameters

    @functools.cache
    def listed(recurse: bool) -> list[tuple[str, nn.Parameter]]:
        return list(walk(recurse=recurse))

    def named(
        self: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if prefix or not remove_duplicate:
            return walk(prefix, recurse, remove_duplicate)
        return iter(listed(recurse))

    return MethodType(named, module)  # torch.compile takes methods alone for those of a module


def _add_to_bucket(optimizer: Any) -> Callable[[Any], None]:
    """Return what moves a gradient into the bucket that is reduced next, as DeepSpeed's does."""
    accelerator = deepspeed.accelerator.get_accelerator()
    stream = optimizer.reduce_and_partition_stream
    waits = not accelerator.resolves_data_dependency()
    records = not accelerator.is_synchronized_device()
    dtype_of, group_of = optimizer.get_param_comm_dtype, optimizer._get_param_partition_group

    def add(parameter: Any) -> None:
        if waits:
            stream.wait_stream(accelerator.current_stream())
        bucket, grad = optimizer.ipg_buckets[dtype_of(parameter)], parameter.grad
        count = grad.numel()
        if bucket.elements + count <= optimizer.reduce_bucket_size:
            with accelerator.stream(stream):
                moved = bucket.buffer.narrow(0, bucket.elements, count).view_as(grad)
                moved.copy_(grad, non_blocking=True)
                if records:
                    grad.record_stream(accelerator.current_stream())
                grad.data = moved
        bucket.params.append(parameter)
        bucket.process_group = group_of(parameter)
        bucket.elements += count

    return add


def _remembered_modules(model: nn.Module) -> Callable[..., Iterator[nn.Module]]:
    """Return `modules` of a model, which DeepSpeed walks twice in every forward."""
    listed = list(model.modules())
    return MethodType(lambda self: iter(listed), model)


class _Unobserved(_zero.parameter_offload.ZeROOrderedDict):  # type: ignore[name-defined]
    """Parameters of a module inside of a leaf module, which is gathered whole.

    No access has to be noticed. The engine would replace a plain dict in the next forward.
    """

    __getitem__ = dict.__getitem__


def _unobserved(module: nn.Module) -> Any:
    parameters = _Unobserved(parent_module=module)
    parameters.update(module._parameters.items())
    return parameters


def _backward_hooks(module: Any, offload: Any) -> tuple[Any, Any]:
    """Return autograd functions to be called before and after the backward of a module.

    They do what DeepSpeed's do, without `setup_context`: with it torch binds the signature of
    `forward` at every call.
    """

    class Before(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, output: Tensor) -> Tensor:
            count = module.__dict__.get("applied_pre_backward_ref_cnt", 0)
            module.applied_pre_backward_ref_cnt = count + 1
            return output.detach()

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            if module.applied_pre_backward_ref_cnt > 0:
                offload.pre_sub_module_backward_function(module)
                module.applied_pre_backward_ref_cnt -= 1
            return slope

    class After(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, entry: Tensor) -> Tensor:
            module.ds_grads_remaining += entry.requires_grad
            return entry.detach()

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            module.ds_grads_remaining -= 1
            if module.ds_grads_remaining == 0:
                offload.post_sub_module_backward_function(module)
            return slope

    return Before, After
