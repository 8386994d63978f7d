"""What ``fuse`` refuses, and what it says."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fused_cna.fusion.records import CALLED_BY_PYTHON, FusionError, LayerRecord
from fused_cna.fusion.signatures import words_of


def check_module(model: object, function: str) -> None:
    """Refuse what is no instance of ``nn.Module`` with a ``TypeError``, in the words of a function."""
    if not isinstance(model, nn.Module):
        what = (
            f"the class {model.__name__}, no instance"
            if isinstance(model, type)
            else f"a {type(model).__name__}"
        )
        raise TypeError(f"{function}() takes an nn.Module, but got {what}")


def check_network(model: nn.Module) -> None:
    """Refuse what cannot be fused as a whole: scripted, quantised, on the meta device or on several."""
    check_module(model, "fuse")
    for name, module in model.named_modules():
        problem = ""
        if isinstance(module, torch.jit.ScriptModule):
            problem = "scripted, which fuse() cannot follow; fuse the network before torch.jit"
        elif _is_quantized(type(module)):
            problem = "quantised; fuse() takes floating-point networks, so fuse before quantising"
        if problem:
            raise FusionError(f"{name or 'the network'} ({type(module).__name__}) is {problem}")
    tensors = (*model.named_parameters(), *model.named_buffers())
    places = {tensor.device: f"{name} on {tensor.device}" for name, tensor in tensors}
    if meta := places.get(torch.device("meta")):
        raise FusionError(f"{meta} device has no values; load them first: to_empty(), load_state_dict()")
    if len(places) > 1:
        given = ", ".join(places.values())
        raise FusionError(f"fuse() takes a network on one device, but got {given}; move it with .to(device)")


def _is_quantized(kind: type) -> bool:
    """Whether a class is one of torch.ao's that compute in integers, or observe; others stay in float."""
    name = f"{kind.__module__}.{kind.__name__}"
    stays = ".intrinsic.modules.fused" in name or name.endswith("FloatFunctional")
    return not stays and (".quantized" in name or "torch.ao.nn" in name)


def as_arguments(example_inputs: Any) -> tuple[Any, ...] | None:
    """Example inputs as the positional arguments of a call; a ``TypeError`` where they hold plain values."""
    if example_inputs is None:
        return None
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    plain = (bool, int, float, str, type, nn.Module, type(None))
    if all(isinstance(leaf, plain) for leaf in pytree.tree_leaves(inputs)):
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
    """With ``strict``, refuse what looks fusible and is not fused; else warn where Python code is why."""
    kind = getattr(network, "plain_class", type(network)).__name__
    missed = [layer for layer in layers if layer.looks_fusible]
    if strict and missed:
        lines = "".join(f"\n  {layer.name}: {layer.reason}" for layer in missed)
        raise FusionError(
            f"strict=True, but of {kind} looks fusible what is not fused, or not with all:{lines}"
        )
    by_python = [layer.name for layer in missed if layer.reason == CALLED_BY_PYTHON]
    if by_python and untraceable:
        path, reason = next(iter(untraceable.items()))
        warnings.warn(
            f"torch.fx cannot follow all of {kind} ({path or kind}: {reason}), so {len(by_python)} of its "
            f"convolutions, such as {by_python[0]}, run as they are; give example_inputs=(...) if it is "
            'called with other arguments, or use torch.compile(model, backend="fused_cna")',
            stacklevel=3,
        )
