"""What ``fuse`` refuses, and what it says."""

import warnings
from typing import Any

import torch
from torch import nn

from fused_cna.fusion.records import FusionError, FusionRecord


def check_module(model: object, function: str) -> None:
    """Refuse what is no instance of ``nn.Module``, in the words of the function that takes one.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(model, nn.Module):
        what = (
            f"the class {model.__name__}; make an instance of it"
            if isinstance(model, type)
            else f"a {type(model).__name__}"
        )
        raise TypeError(f"{function}() takes an nn.Module, but got {what}")


def check_network(model: object) -> None:
    """Refuse what cannot be fused as a whole.

    Raises:
        TypeError: no instance of ``nn.Module``.
        FusionError: scripted, quantised, on the meta device, or on several devices.
    """
    check_module(model, "fuse")
    assert isinstance(model, nn.Module)
    for name, module in model.named_modules():
        where = f"{name} ({type(module).__name__})" if name else type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise FusionError(
                f"{where} is scripted, which fuse() cannot follow; fuse the network before torch.jit"
            )
        if ".quantized" in type(module).__module__ or "torch.ao.nn" in type(module).__module__:
            raise FusionError(
                f"{where} is quantised; fuse() takes floating-point networks, so fuse before quantising"
            )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    devices = {tensor.device: name for name, tensor in tensors}
    for device, name in devices.items():
        if device.type == "meta":
            raise FusionError(
                f"{name} is on the meta device and has no values; load them first, with to_empty() and "
                "load_state_dict()"
            )
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise FusionError(f"fuse() takes a network on one device, but got {places}; move it with .to(device)")


def as_arguments(example_inputs: Any, needed_for: str) -> tuple[Any, ...] | None:
    """Example inputs as the positional arguments of a call.

    Raises:
        TypeError: they hold nothing but plain values.
        FusionError: there are none, but something needs them.
    """
    if example_inputs is None:
        if needed_for:
            raise FusionError(
                f"{needed_for} needs example_inputs: a tensor, or a tuple of the arguments of a call"
            )
        return None
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    leaves = torch.utils._pytree.tree_leaves(inputs)
    if all(leaf is None or isinstance(leaf, (bool, int, float, str, type, nn.Module)) for leaf in leaves):
        raise TypeError(
            "example_inputs must be a tensor or a tuple with the arguments of a call, some of them tensors, "
            f"but got {str(example_inputs)[:80]}"
        )
    return inputs


def check_record(record: FusionRecord, network: nn.Module, *, has_inputs: bool, strict: bool) -> None:
    """Refuse a result that is not what was asked for.

    Raises:
        FusionError: nothing could be followed, and example inputs would help; with ``strict``, something
            that looks fusible was not fused.
    """
    kind = getattr(network, "plain_class", type(network)).__name__
    untraced = [f"{path or kind}: {reason}" for path, reason in record.untraceable.items()]
    missed = [layer for layer in record.layers if layer.looks_fusible]
    if untraced and not has_inputs and missed:
        fused = any(layer.fused for layer in record.layers)
        message = (
            f"torch.fx cannot follow all of {kind} ({untraced[0]}), so what takes the result of "
            f"{_convolutions(len(missed))} is not known, such as {missed[0].name}; pass "
            "example_inputs=(...), with which fuse() runs the network once to see"
        )
        if not fused or strict:
            raise FusionError(message)
        warnings.warn(message, stacklevel=3)
    if strict and missed:
        lines = "".join(f"\n  {layer.name}: {layer.reason}" for layer in missed)
        look = "looks fusible and is" if len(missed) == 1 else "look fusible and are"
        raise FusionError(
            f"strict=True, but {_convolutions(len(missed))} of {kind} {look} not fused, or not with all:"
            f"{lines}"
        )


def _convolutions(count: int) -> str:
    return f"{count} convolution{'s' * (count != 1)}"
