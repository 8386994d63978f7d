"""``fuse`` and ``unfuse``: whole networks, by data flow."""

import copy
import warnings
from typing import Any, TypeVar

from torch import nn
from torch.fx import Node

from fused_cna.fusion import checks
from fused_cna.fusion.building import build_overlay
from fused_cna.fusion.calls import Norm, kind_of
from fused_cna.fusion.matching import Matches, match
from fused_cna.fusion.overlay import FusedNetwork, check_class, lay_over, take_off
from fused_cna.fusion.records import NAME as RECORD
from fused_cna.fusion.records import FusionError, FusionRecord, LayerRecord, parts_of
from fused_cna.fusion.symbolic import NotTraceableError, Trace, pass_through, trace
from fused_cna.modules import ConvNormAct, fused_epilogue

Network = TypeVar("Network", bound=nn.Module)


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
    :class:`ConvNormAct` blocks that share the modules of the network. (They are in its attribute
    ``fused_cna_overlay``, not among its modules, so code that walks these sees what it always saw.) In
    training mode, with options of ``forward`` other than their defaults, or after a module was exchanged or
    hooked or an attribute set, it runs as it was written. (Not seen are changes outside of its modules, such
    as of global variables; and a network that ``torch.compile`` has compiled sees what it sees when that
    compiles, so compile anew after an attribute or a module was changed.) Nothing derived from a parameter is
    kept (but see ``freeze``). Weights of blocks are laid out in channels_last where the network's code
    cannot tell, and results come in that layout then.

    A convolution is fused with what follows as far as nothing else sees what is between. Left alone are
    convolutions that share a weight or a norm with different groups, have hooks or parametrizations, or
    compute their weight; :func:`report` says which, and why.

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
            back the network with its parameters. oneDNN's ReLU, ReLU6 and Hardsigmoid make numbers of NaN.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``example_inputs`` no tensors.
        FusionError: ``model`` is scripted, quantised, or on the meta device or several devices; it can
            neither be traced nor was it given example inputs, and no part of it could be fused; with
            ``strict``, something was not fused; with ``verify``, the results differ.
    """
    checks.check_network(model)
    inputs = checks.as_arguments(example_inputs, needed_for="verify=True" if verify else "")
    network = model if inplace else _copy(model)
    try:
        record = fuse_in_place(network, inputs, freeze=freeze)
        checks.check_record(record, network, has_inputs=inputs is not None, strict=strict)
        if verify and inputs is not None:
            from fused_cna.fusion.verification import verify_fused

            verify_fused(model if not inplace else unfuse(network), network, inputs)
    except BaseException:
        unfuse(network, inplace=True)
        raise
    if model.training:
        warnings.warn(
            f"{type(model).__name__} is in training mode: it was fused for eval mode, and runs as it was "
            "written, with live parameters, until eval() is called",
            stacklevel=2,
        )
    return network


def fuse_in_place(network: nn.Module, inputs: tuple[Any, ...] | None, *, freeze: bool) -> FusionRecord:
    """Fuse what can be fused of a network, and leave the record of it there. Its modes stay as they are."""
    unfuse(network, inplace=True)
    modes = [(module, module.training) for module in network.modules()]
    fuser = _Fuser(freeze, {module for module, training in modes if training and not network.training})
    record = network.__dict__[RECORD] = fuser.record
    try:
        network.eval()
        fuser.fuse(network, "")
        if record.untraceable and inputs is not None:
            from fused_cna.fusion import swapping

            swapping.swap_observed(network, inputs, record)
    finally:
        for module, training in modes:
            module.training = training
    _note_the_idle(network, record)
    return record


def unfuse(model: Network, *, inplace: bool = False) -> Network:
    """The plain network that :func:`fuse` made a fused one of, with its parameters as they are now.

    Args:
        model: a fused network; any other is returned as it is.
        inplace: change and return ``model`` itself instead of a copy of it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse() takes an nn.Module, but got {type(model).__name__}")
    network = model if inplace else _copy(model)
    record = network.__dict__.pop(RECORD, None)
    if record is not None and record.swaps:
        from fused_cna.fusion import swapping

        swapping.undo(network, record.swaps)
    for module in list(network.modules()):
        if isinstance(module, FusedNetwork):
            take_off(module)
    return network


_TO_PYTHON = "Python code that cannot be followed takes its result"


class _Fuser:
    """Lays overlays over a network, or over the largest of its submodules that can be traced."""

    def __init__(self, freeze: bool, training: set[nn.Module]) -> None:
        self.record = FusionRecord([])
        self._freeze = freeze
        self._training = training
        self._seen: set[nn.Module] = set()

    def fuse(self, network: nn.Module, path: str) -> None:
        """Fuse a module and everything in it; ``path`` is where it is in the network."""
        if network in self._seen or not _has_convs(network):
            return
        self._seen.add(network)
        if isinstance(network, ConvNormAct):
            norm, act, _ = fused_epilogue(network, False)
            words = ("conv", "norm" if norm else "", "" if act == "identity" else act)
            self._note(f"{path}.conv", " + ".join(filter(None, words)), "", missed=False)
            return
        if kind_of(network) is not None:
            self._note(path, "conv", _TO_PYTHON, missed=True)
            return
        try:
            check_class(type(network))
            traced = trace(network, self._training)
            pass_through(traced)
            matches = match(traced.graph, traced.modules, lambda a, b: None)
            if matches.aliasing.overwrites_values():
                raise NotTraceableError("its forward overwrites a parameter or buffer")
        except NotTraceableError as error:
            self.record.untraceable[path] = str(error)
            for name, child in network.named_children():
                self.fuse(child, f"{path}.{name}".lstrip("."))
            return
        self._overlay(network, path, traced, matches)
        for name, leaf in traced.modules.items():
            if kind_of(leaf) is None:
                self.fuse(leaf, f"{path}.{name}".lstrip("."))

    def _note(self, name: str, parts: str, reason: str, missed: bool) -> None:
        self.record.layers.append(LayerRecord(name.strip("."), parts, reason, missed))

    def _overlay(self, network: nn.Module, path: str, traced: Trace, matches: Matches) -> None:
        self._leave_training(matches)
        for group in matches.groups:
            name = f"{path}.{_name_of(group.conv)}"
            leaves = (
                bool(path)
                and group.act is None
                and any(user.op == "output" for user in group.nodes[-1].users)
            )
            self._note(name, parts_of(group, matches), group.reason or _TO_PYTHON * leaves, group.missed)
        for node, reason in matches.refused.items():
            self._note(f"{path}.{_name_of(node)}", "conv", reason, missed=True)
        overlay = build_overlay(network, traced, matches, path, freeze=self._freeze)
        if overlay is not None:
            lay_over(network, overlay)

    def _leave_training(self, matches: Matches) -> None:
        """A norm in training mode within a network in eval mode uses the statistics of the batch."""
        for group in matches.groups:
            norm = matches.calls.get(group.norm) if group.norm is not None else None
            if isinstance(norm, Norm) and norm.module in self._training:
                group.leave("its norm is in training mode")


def _copy(model: Network) -> Network:
    try:
        return copy.deepcopy(model)
    # Modules may refuse to be copied in any way they like.
    except Exception as error:
        raise FusionError(
            f"{type(model).__name__} cannot be copied ({error}); pass inplace=True to change it itself"
        ) from error


def _name_of(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _has_convs(network: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in network.modules())


def _note_the_idle(network: nn.Module, record: FusionRecord) -> None:
    """Note the convolutions that no code reaches, such as heads that only training uses."""
    noted = {layer.name for layer in record.layers}
    shared = {id(network.get_submodule(name)) for name in noted if _is_path(network, name)}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and name not in noted and id(module) not in shared:
            record.layers.append(LayerRecord(name, "conv", "it does not run in eval mode"))


def _is_path(network: nn.Module, name: str) -> bool:
    return any(name == path for path, _ in network.named_modules())
