"""Fusing what is left in Python code that cannot be followed, by what one run of it shows."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from fused_cna.fusion import handover
from fused_cna.fusion.boundaries import live_block
from fused_cna.fusion.calls import Act, Add, Norm, kind_of
from fused_cna.fusion.frozen import FrozenConv
from fused_cna.fusion.handover import FunctionStep, Step
from fused_cna.fusion.matching import Group, Matches, match
from fused_cna.fusion.observing import GIVEN, observe
from fused_cna.fusion.overlay import NAME as OVERLAY
from fused_cna.fusion.records import FusionRecord, LayerRecord, parts_of
from fused_cna.fusion.rewriting import act_module
from fused_cna.modules import ConvNormAct


@dataclass
class Swap:
    """A convolution that computes what follows it, and hands it over."""

    name: str
    conv: nn.Module
    steps: tuple[Step, ...]

    @property
    def modules(self) -> list[nn.Module]:
        return [self.conv, *(step for step in self.steps if isinstance(step, nn.Module))]


def swap_observed(network: nn.Module, inputs: tuple[Any, ...], record: FusionRecord) -> None:
    """Fuse convolutions with what follows them in one run of a network, in place.

    Modules keep their places, names and parameters; those of a group get a subclass of their class. Additions
    in Python code stay there.

    Args:
        network: in eval mode; overlays may lie over parts of it.
        inputs: the arguments of the run. Neither they nor the network are changed by it.
        record: gets the groups, and the reasons why there are not more.

    Raises:
        FusionError: the network does not run on ``inputs``.
    """
    paths = _paths_of_parts(network)
    observed = observe(network, inputs, {module: names[0] for module, names in paths.items()})
    matches = match(observed.graph, observed.modules, lambda a, b: None, residuals=False)
    for group in matches.groups:
        _keep_what_can_be_swapped(group, matches)
    groups: dict[nn.Module, list[Group]] = {}
    for group in matches.groups:
        if group.call.module is not None:
            groups.setdefault(group.call.module, []).append(group)
    records = {layer.name: layer for layer in record.layers}
    refused = {str(node.target): reason for node, reason in matches.refused.items()}
    for conv, names in paths.items():
        if not isinstance(conv, nn.Conv2d):
            continue
        layer = next((records[name] for name in names if name in records), None)
        if layer is None:
            layer = LayerRecord(names[0], "conv")
            record.layers.append(layer)
        _swap(conv, groups.get(conv, []), refused.get(names[0], ""), layer, matches, record)


def undo(network: nn.Module, swaps: list[Swap]) -> None:
    """Make plain modules again of all that :func:`swap_observed` has changed."""
    for swap in swaps:
        for module in swap.modules:
            handover.part(module)
    for module in network.modules():
        handover.part(module)


def _paths_of_parts(network: nn.Module) -> dict[nn.Module, list[str]]:
    """The modules that could be parts of groups, with their paths; not those that are in fused blocks."""
    overlays = [module.__dict__[OVERLAY] for module in network.modules() if OVERLAY in module.__dict__]
    taken = {
        part
        for owner in (network, *overlays)
        for block in owner.modules()
        if isinstance(block, (ConvNormAct, FrozenConv))
        for part in live_block(block).modules()
    }
    paths: dict[nn.Module, list[str]] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        if module not in taken and kind_of(module) is not None:
            paths.setdefault(module, []).append(path)
    return paths


def _keep_what_can_be_swapped(group: Group, matches: Matches) -> None:
    """Reduce a group to a convolution, a norm that is a module, and an activation."""
    group.pad = None
    norm, act = _call_of(group.norm, matches), _call_of(group.act, matches)
    if isinstance(norm, Norm) and norm.module is None:
        group.leave("its norm is a function that Python code calls")
    elif isinstance(norm, Norm) and (user := _user_of_parameters(group, norm)) is not None:
        group.leave(f"its norm's parameters are used before the norm, by {user.name}")
    elif isinstance(act, Act) and act.module is None and _function_step(group.act, act) is None:
        group.act = None
    if not group.missed and any(isinstance(_call_of(user, matches), Add) for user in group.nodes[-1].users):
        group.reason = "what follows is an addition in Python code"


def _user_of_parameters(group: Group, norm: Norm) -> Node | None:
    """Code between a convolution and its norm that sees a parameter of the norm, and might change it."""
    parameters = {id(value) for value in (norm.weight, norm.bias, norm.mean, norm.var)}
    node = group.conv.next
    while node is not group.norm:
        if any(source.meta.get(GIVEN) in parameters for source in node.all_input_nodes):
            return node
        node = node.next
    return None


def _call_of(node: Node | None, matches: Matches) -> Any:
    return None if node is None else matches.calls.get(node)


def _function_step(node: Node | None, act: Act) -> FunctionStep | None:
    """The call of an activation function; None where it is no call with the tensor first."""
    if node is None or not node.args or node.args[0] is not act.x:
        return None
    function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
    return FunctionStep(function, tuple(node.args[1:]), dict(node.kwargs), act_module(act), act.overwrites)


def _steps_of(group: Group, matches: Matches) -> tuple[Step, ...]:
    norm, act = _call_of(group.norm, matches), _call_of(group.act, matches)
    steps: list[Step] = [] if not isinstance(norm, Norm) or norm.module is None else [norm.module]
    if isinstance(act, Act):
        step = act.module or _function_step(group.act, act)
        assert step is not None
        steps.append(step)
    return tuple(steps)


def _signature(steps: tuple[Step, ...]) -> list[Any]:
    return [
        (step.function, step.args, step.kwargs) if isinstance(step, FunctionStep) else id(step)
        for step in steps
    ]


def _swap(
    conv: nn.Conv2d,
    groups: list[Group],
    refused: str,
    layer: LayerRecord,
    matches: Matches,
    record: FusionRecord,
) -> None:
    if not groups:
        layer.parts, layer.looks_fusible = "conv", bool(refused)
        layer.reason = refused or "it did not run for the example inputs"
        return
    steps = _steps_of(groups[0], matches)
    if any(_signature(_steps_of(group, matches)) != _signature(steps) for group in groups):
        # The matcher has seen to it that they differ in the activation module at most.
        for group in groups:
            group.act = None
        steps = _steps_of(groups[0], matches)
    layer.parts, layer.reason, layer.looks_fusible = (
        parts_of(groups[0], matches),
        groups[0].reason,
        groups[0].missed,
    )
    if steps:
        layer.looks_fusible = False
        handover.join(conv, steps)
        record.swaps.append(Swap(layer.name, conv, steps))
