"""``fuse`` and ``unfuse``: whole networks, by data flow."""

import copy
import warnings
from typing import Any, TypeVar

import torch
from torch import fx, nn

from fused_cna.fusion import checks, rewriting
from fused_cna.fusion.calls import kind_of
from fused_cna.fusion.matching import Matches, match
from fused_cna.fusion.overlay import FusedNetwork, Overlay, lay_over, take_off
from fused_cna.fusion.records import NAME as RECORD
from fused_cna.fusion.records import FusionError, FusionRecord, LayerRecord, parts_of
from fused_cna.fusion.symbolic import NotTraceableError, Trace, pass_through, trace

Network = TypeVar("Network", bound=nn.Module)

# What a network may do with a tensor that does not work in every memory format.
_SENSITIVE_METHODS = {"view", "view_as", "as_strided", "stride", "is_contiguous", "data_ptr"}


def fuse(
    model: Network,
    *,
    example_inputs: Any = None,
    inplace: bool = False,
    strict: bool = False,
    verify: bool = False,
    freeze: bool = False,
) -> Network:
    """The network with its convolutions fused with what follows them.

    Equivalent to ``copy.deepcopy(model)``: it computes the same, has the same class (a subclass of it), the
    same modules and names, and loads and gives the same ``state_dict``. In eval mode, called with tensors, it
    runs as a graph whose groups of convolution, batch norm, residual addition and activation are
    :class:`ConvNormAct` blocks that share the modules of the network. In training mode, with options of
    ``forward`` other than their defaults, or after a module was exchanged or hooked, it runs as it was
    written. Nothing derived from a parameter is kept (but see ``freeze``).

    A convolution is fused with what follows as far as nothing else sees what is between. Left alone are
    convolutions that share a weight or a norm with different groups, have hooks or parametrizations, or
    compute their weight; :func:`report` says which, and why.

    Attributes of modules that steer ``forward``, such as a dropout rate, count as they were when fused.

    Args:
        model: any network, on any device, in any mode; in training mode it is fused for when it will be in
            eval mode, and a warning says so.
        example_inputs: a tensor or the arguments of ``forward`` in a tuple, as a call would have them.
            Needed for ``verify``, and for networks that ``torch.fx`` cannot follow: the network then runs
            once, and modules are exchanged where its Python code calls them. Without, only those submodules
            of such a network are fused that can be followed, with a warning.
        inplace: change and return ``model`` itself instead of a copy of it.
        strict: raise where something that looks as if it could be fused is not.
        verify: compare with ``model`` on the example inputs, see :func:`verify_fused`.
        freeze: fold the batch norms into weights of the blocks' own, once, and pack these for the CPU: a
            snapshot that does not see later changes of a parameter, for inference on a CPU; ``unfuse`` gives
            back the network with its parameters as they were.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``example_inputs`` no tensors.
        FusionError: ``model`` is scripted, quantised, or on the meta device or several devices; it can
            neither be traced nor was it given example inputs, and no part of it could be fused; with
            ``strict``, something was not fused; with ``verify``, the results differ.
    """
    checks.check_network(model)
    inputs = checks.as_arguments(example_inputs, needed_for="verify=True" if verify else "")
    network = model if inplace else copy.deepcopy(model)
    unfuse(network, inplace=True)
    modes = [(module, module.training) for module in network.modules()]
    fuser = _Fuser(freeze, {module for module, training in modes if training and not model.training})
    try:
        network.eval()
        fuser.fuse(network, "")
        record = FusionRecord(fuser.layers, fuser.untraceable, fuser.swaps)
        if fuser.untraceable and inputs is not None:
            from fused_cna.fusion import swapping

            swapping.swap_observed(network, inputs, record)
        network.__dict__[RECORD] = record
        checks.check_record(record, network, has_inputs=inputs is not None, strict=strict)
        for module, training in modes:
            module.training = training
        if verify and inputs is not None:
            from fused_cna.fusion.verification import verify_fused

            verify_fused(model if not inplace else unfuse(network), network, inputs)
    except BaseException:
        unfuse(network, inplace=True)
        raise
    finally:
        for module, training in modes:
            module.training = training
    if model.training:
        warnings.warn(
            f"{type(model).__name__} is in training mode: it was fused for eval mode, and runs as it was "
            "written, with live parameters, until eval() is called",
            stacklevel=2,
        )
    return network


def unfuse(model: Network, *, inplace: bool = False) -> Network:
    """The plain network that :func:`fuse` made a fused one of, with its parameters as they are now.

    Args:
        model: a fused network; any other is returned as it is.
        inplace: change and return ``model`` itself instead of a copy of it.
    """
    network = model if inplace else copy.deepcopy(model)
    record = network.__dict__.pop(RECORD, None)
    if record is not None and record.swaps:
        from fused_cna.fusion import swapping

        swapping.undo(network, record.swaps)
    for module in list(network.modules()):
        if isinstance(module, FusedNetwork):
            take_off(module)
    return network


class _Fuser:
    """Lays overlays over a network, or over the largest of its submodules that can be traced."""

    def __init__(self, freeze: bool, training: set[nn.Module]) -> None:
        self.freeze = freeze
        self.training = training
        self.layers: list[LayerRecord] = []
        self.untraceable: dict[str, str] = {}
        self.swaps: list[Any] = []
        self._seen: set[nn.Module] = set()

    def fuse(self, network: nn.Module, path: str) -> None:
        if network in self._seen or not has_convs(network):
            return
        self._seen.add(network)
        if kind_of(network) is not None:
            self._leave(path, network, "it is called by code that cannot be followed")
            return
        try:
            traced = trace(network)
        except NotTraceableError as error:
            self.untraceable[path] = str(error)
            for name, child in network.named_children():
                self.fuse(child, f"{path}.{name}".lstrip("."))
            return
        self._overlay(network, path, traced)
        for name, leaf in traced.modules.items():
            if kind_of(leaf) is None:
                self.fuse(leaf, f"{path}.{name}".lstrip("."))

    def _leave(self, path: str, conv: nn.Module, reason: str) -> None:
        if isinstance(conv, nn.Conv2d):
            self.layers.append(LayerRecord(path, "conv", reason, looks_fusible=True))

    def _overlay(self, network: nn.Module, path: str, traced: Trace) -> None:
        pass_through(traced, self.training)
        matches = match(traced.graph, traced.modules, lambda a, b: None)
        self._leave_training(matches)
        overlay = self._rewrite(network, traced, matches, path)
        if overlay is not None:
            lay_over(network, overlay)

    def _leave_training(self, matches: Matches) -> None:
        """A norm in training mode within a network in eval mode uses the statistics of the batch."""
        for group in matches.groups:
            norm = matches.calls.get(group.norm) if group.norm is not None else None
            if norm is not None and getattr(norm, "module", None) in self.training:
                group.norm = group.add = group.act = group.residual = group.pad = None
                group.reason, group.missed = "its norm is in training mode", True

    def _rewrite(self, network: nn.Module, traced: Trace, matches: Matches, path: str) -> Overlay | None:
        names = _conv_names(traced, matches)
        sensitive = _is_layout_sensitive(traced)
        blocks: dict[tuple[Any, ...], tuple[str, nn.Module]] = {}
        modules: dict[str, nn.Module] = dict(traced.modules)
        rewriter = rewriting.Rewriter(traced.graph, matches)
        for group in matches.groups:
            name = names[group.conv]
            self.layers.append(
                LayerRecord(f"{path}.{name}".strip("."), parts_of(group, matches), group.reason, group.missed)
            )
            if not (group.is_fused or (self.freeze and group.call.module is not None and not group.missed)):
                continue
            block = rewriting.block_of(group, matches, f"{path}.{name}".strip("."))
            if block is None:
                rewriter.emit_call(group)
                continue
            key = tuple(id(part) for part in block.children() if part.__class__ is not nn.Identity)
            key += (block.residual_order, block.zero_pad, str(block.act))
            target = f"blocks.{len(blocks)}"
            if key in blocks:
                target = blocks[key][0]
            else:
                blocks[key] = (target, self._finished(block))
                modules[target] = blocks[key][1]
            rewriter.emit_block(group, target)
        for node, reason in matches.refused.items():
            self.layers.append(
                LayerRecord(
                    f"{path}.{node.target if node.op == 'call_module' else node.name}".strip("."),
                    "conv",
                    reason,
                    True,
                )
            )
        if (
            not any(
                node.op == "call_function" and node.target is rewriting.conv_norm_act
                for node in traced.graph.nodes
            )
            and not blocks
        ):
            return None
        places = _places(network, traced)
        if not sensitive:
            for _, block in blocks.values():
                _lay_out(block)
        values = rewriting.values_as_inputs(traced.graph)
        rewriting.keep_views_apart(traced.graph)
        used = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
        graph = fx.GraphModule({name: modules[name] for name in modules if name in used}, traced.graph)
        return Overlay(graph, traced.inputs, values, places, traced.entered)

    def _finished(self, block: Any) -> nn.Module:
        if not self.freeze:
            return block
        from fused_cna.fusion.frozen import FrozenConv

        frozen = FrozenConv.from_block(block)
        frozen.group_name = block.group_name  # type: ignore[assignment]
        return frozen


def has_convs(network: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in network.modules())


def _conv_names(traced: Trace, matches: Matches) -> dict[Any, str]:
    return {
        group.conv: str(group.conv.target) if group.conv.op == "call_module" else group.conv.name
        for group in matches.groups
    }


def _is_layout_sensitive(traced: Trace) -> bool:
    """Whether the code might not run, or differently, where results come in another memory format."""
    for node in traced.graph.nodes:
        if node.op == "call_method" and node.target in _SENSITIVE_METHODS:
            return True
        if node.op == "call_module":
            module = traced.modules[str(node.target)]
            if kind_of(module) is None and not type(module).__module__.startswith("torch.nn"):
                return True
    return False


def _lay_out(block: nn.Module) -> None:
    """The weight as kernels read it: channels_last."""
    conv = getattr(block, "conv", None)
    if isinstance(conv, nn.Conv2d) and conv.weight.dim() == 4:
        with torch.no_grad():
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)


def _places(network: nn.Module, traced: Trace) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """Where every module on the way to a leaf of the graph is kept."""
    places: dict[str, tuple[dict[str, Any], str, nn.Module]] = {}
    for path in traced.modules:
        owner, done = network, ""
        for name in path.split("."):
            module = owner.get_submodule(name)
            done = f"{done}.{name}"
            places[done] = (owner._modules, name, module)  # type: ignore[assignment]
            owner = module
    return list(places.values())
