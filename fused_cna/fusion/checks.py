"""What ``fuse`` refuses, and what it says."""

import warnings
from typing import Any

import torch
from torch import nn

from fused_cna.fusion.records import CALLED_BY_PYTHON, FusionError, LayerRecord
from fused_cna.fusion.signatures import words_of


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
        if _is_quantized(type(module)):
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


def _is_quantized(kind: type) -> bool:
    """Whether a class is one of torch.ao's that compute in integers, or observe; others stay in float."""
    if (
        kind.__name__ in ("FloatFunctional", "FXFloatFunctional")
        or ".intrinsic.modules.fused" in kind.__module__
    ):
        return False
    return ".quantized" in kind.__module__ or "torch.ao.nn" in kind.__module__


def as_arguments(example_inputs: Any) -> tuple[Any, ...] | None:
    """Example inputs as the positional arguments of a call.

    Raises:
        TypeError: they hold nothing but plain values.
    """
    if example_inputs is None:
        return None
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    leaves = torch.utils._pytree.tree_leaves(inputs)
    if all(leaf is None or isinstance(leaf, (bool, int, float, str, type, nn.Module)) for leaf in leaves):
        raise TypeError(
            "example_inputs must be a tensor or a tuple with the arguments of a call, some of them tensors, "
            f"but got {str(example_inputs)[:80]}"
        )
    return inputs


def does_not_run(network: nn.Module, error: Exception) -> str:
    """What to say of a network that fails on its example inputs."""
    plain = getattr(network, "plain_class", type(network))
    return f"{plain.__name__} fails on example_inputs: {error}. {plain.__name__}{words_of(plain.forward)}"


def check_result(
    network: nn.Module, layers: list[LayerRecord], untraceable: dict[str, str], *, strict: bool
) -> None:
    """Say what was not fused for Python code that cannot be followed; with ``strict``, refuse what was not.

    Raises:
        FusionError: with ``strict``, something that looks fusible was not fused.
    """
    kind = getattr(network, "plain_class", type(network)).__name__
    missed = [layer for layer in layers if layer.looks_fusible]
    if strict and missed:
        lines = "".join(f"\n  {layer.name}: {layer.reason}" for layer in missed)
        look = "looks fusible and is" if len(missed) == 1 else "look fusible and are"
        raise FusionError(
            f"strict=True, but {_convolutions(len(missed))} of {kind} {look} not fused, or not with all:"
            f"{lines}"
        )
    by_python = [layer.name for layer in missed if layer.reason == CALLED_BY_PYTHON]
    if by_python and untraceable:
        path, reason = next(iter(untraceable.items()))
        warnings.warn(
            f"torch.fx cannot follow all of {kind} ({path or kind}: {reason}), so "
            f"{_convolutions(len(by_python))} in that code, such as {by_python[0]}, run as they are; give "
            "example_inputs=(...) if it is called with other arguments, or use "
            'torch.compile(model, backend="fused_cna")',
            stacklevel=3,
        )


def _convolutions(count: int) -> str:
    return f"{count} convolution{'s' * (count != 1)}"
