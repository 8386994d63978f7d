"""``fuse`` and ``unfuse``: whole networks, by data flow."""

import copy
import operator
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fused_cna.fusion import checks
from fused_cna.fusion.groups import match
from fused_cna.fusion.nodes import kind_of
from fused_cna.fusion.overlay import FusedNetwork, Overlay, Overlays, lay_over, take_off
from fused_cna.fusion.questions import asks_own_class
from fused_cna.fusion.records import OVERLAYS, FusionError, LayerRecord, records_of
from fused_cna.fusion.rewrite import build_overlay
from fused_cna.fusion.signatures import Key
from fused_cna.fusion.trace import NotTraceableError, left_as_it_is, lock, pass_through, trace
from fused_cna.fusion.verify import verify_fused
from fused_cna.fusion.written_out import gather_norms
from fused_cna.modules import ConvNormAct

Network = TypeVar("Network", bound=nn.Module)


def fuse(
    model: Network,
    *,
    example_inputs: Any = None,
    inplace: bool = False,
    strict: bool = False,
    verify: bool = True,
    freeze: bool = False,
    cuda_graphs: bool = False,
) -> Network:
    """The network with its convolutions fused with what follows them.

    Equivalent to ``copy.deepcopy(model)``: it computes the same, has the same class (a subclass of it), the
    same modules and names, and loads and gives the same ``state_dict``; weights keep their memory format, and
    results have the strides that they had. In eval mode it runs as a graph whose groups of convolution, batch
    norm, residual addition and activation are :class:`ConvNormAct` blocks that share the modules of the
    network. (They are in attributes ``fused_cna_overlay``, not among its modules, so code that walks these
    sees what it always saw.) There is a graph for each signature of a call: which arguments are tensors, in
    lists or dicts or not, and the values of the others. It is made when such a call first comes, or at once
    from ``example_inputs``. What cannot be followed runs as it was written, and its parts as graphs.

    In training mode, or after a module was exchanged or hooked or an attribute set that its code reads, a
    part runs as it was written. (Not seen are changes outside of its modules, such as of global variables;
    and a network that ``torch.compile`` has compiled sees what it sees when that compiles, so compile anew
    after an attribute or a module was changed.) Nothing derived from a parameter is kept (but see
    ``freeze``).

    A convolution is fused with what follows as far as nothing else sees what is between. Left alone are
    convolutions that have hooks or parametrizations, or compute their weight; :func:`report` says which, and
    why.

    Args:
        model: any network, on any device, in any mode; in training mode it is fused for when it will be in
            eval mode, and a warning says so.
        example_inputs: a tensor or the arguments of ``forward`` in a tuple, as a call would have them.
        inplace: change and return ``model`` itself instead of a copy of it.
        strict: raise where something that looks as if it could be fused is not.
        verify: compare with ``model`` on the example inputs, see :func:`verify_fused`.
        freeze: fold the batch norms into weights of the blocks' own, once, and pack these for the CPU: a
            snapshot for inference on a CPU. Where a parameter was written to since, the network runs as it
            was written. Writes through ``.data`` are not seen. oneDNN's ReLU, ReLU6 and Hardsigmoid make
            numbers of NaN.
        cuda_graphs: on a GPU, run a call as a replay of a CUDA graph, captured when such a call first comes:
            one launch in place of one for each convolution. There is a graph for each kind of inputs
            (shapes, dtypes, strides) and settings (autocast, precision), at most 8. Inputs are copied into
            its memory and results out of it, so results are the caller's to keep. Parameters changed in
            place are seen; after parameters or modules were exchanged, or hooks were added, the network is
            captured anew. Launched kernel by kernel, with one warning that says why, is what no graph can
            do: further kinds of inputs, networks that cannot be followed as a whole or call code of others,
            operators for which the host waits, results that are inputs or parameters; and without one, calls
            where a gradient is wanted, and those within another capture, transform or compiler. Side effects
            of Python, such as prints and counters, are not repeated by a replay. Held beside the parameters
            are copies of each graph's inputs and results, and a pool for what is between, which the graphs
            share. A copy of the network captures anew. Not together with ``freeze``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``example_inputs`` no tensors.
        ValueError: ``freeze`` and ``cuda_graphs`` are both True.
        FusionError: ``model`` is scripted, quantised, or on the meta device or several devices; it does not
            run on the example inputs; with ``strict``, something was not fused; the results differ.
    """
    checks.check_network(model)
    inputs = checks.as_arguments(example_inputs)
    if freeze and cuda_graphs:
        raise ValueError(
            "freeze=True is for inference on a CPU and cuda_graphs=True for a GPU, but got both; give one"
        )
    with lock:
        network = model if inplace else copy_of(model)
        try:
            fuse_in_place(network, freeze=freeze, cuda_graphs=cuda_graphs)
            if inputs is not None:
                (verify_fused if verify else run_once)(network, inputs)
            checks.check_result(network, *records_of(network), strict=strict)
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


def fuse_in_place(network: nn.Module, *, freeze: bool, cuda_graphs: bool = False) -> None:
    """Lay overlays over a network and every part of it, and trace what can be for calls with tensors.

    With ``cuda_graphs`` the calls of the network itself are captured, of which its parts are parts.
    """
    with lock:
        unfuse(network, inplace=True)
        for module in list(network.modules()):
            if _may_be_laid_over(module):
                try:
                    lay_over(module, Overlays(make_overlay, freeze, cuda_graphs and module is network))
                except NotTraceableError:
                    continue
        with left_as_it_is(network):
            trace_ahead(network, set())


def trace_ahead(network: nn.Module, seen: set[nn.Module]) -> None:
    """Trace a network, or the parts of it that can be, for calls with nothing but tensors."""
    if network in seen:
        return
    seen.add(network)
    parts: Any = network.children()
    overlays = network.__dict__.get(OVERLAYS)
    if overlays is not None:
        overlay = overlays.make_default(network)
        if isinstance(overlay, Overlay):
            parts = overlay.leaves.values()
    for part in parts:
        trace_ahead(part, seen)


def make_overlay(network: nn.Module, key: Key, freeze: bool) -> Overlay:
    """The overlay of a network in eval mode for a signature.

    Raises:
        NotTraceableError: the network cannot be followed, with the reason.
    """
    assert isinstance(network, FusedNetwork)
    forward = network.plain_class.forward
    live = {module for module in network.modules() if module.training}
    traced = trace(network, forward, key, live)
    pass_through(traced)
    gather_norms(traced.graph, traced.modules, lambda node, x, vectors: _are_vectors(network, vectors))
    matches = match(traced.graph, traced.modules, lambda a, b: None)
    if matches.aliasing.overwrites_values():
        raise NotTraceableError("its forward overwrites a parameter or buffer")
    for group in matches.groups:
        if group.norm_call is not None and group.norm_call.module in live:
            group.leave("its norm is in training mode")
    layers = [LayerRecord(_name_of(g.conv), g.parts(), g.reason, g.missed) for g in matches.groups]
    return build_overlay(network, traced, matches, layers, freeze=freeze)


def _are_vectors(network: nn.Module, nodes: Sequence[Node]) -> bool:
    """Whether parameters of a network are vectors of one dtype."""
    held = [operator.attrgetter(str(node.target))(network) for node in nodes if node.op == "get_attr"]
    return len(held) == len(nodes) and {(one.dim(), one.dtype) for one in held} == {(1, held[0].dtype)}


def run_once(network: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Run a fused network on copies of example inputs, so that all of its signatures are traced.

    Raises:
        FusionError: it does not run.
    """
    with torch.no_grad(), left_as_it_is(network, of_tensors=True):
        try:
            network(*pytree.tree_map_only(torch.Tensor, torch.clone, inputs))
        except Exception as error:
            raise FusionError(checks.does_not_run(network, error)) from error


def unfuse(model: Network, *, inplace: bool = False) -> Network:
    """The plain network that :func:`fuse` made a fused one of, with its parameters as they are now.

    Args:
        model: a fused network; any other is returned as it is.
        inplace: change and return ``model`` itself instead of a copy of it.
    """
    checks.check_module(model, "unfuse")
    with lock:
        network = model if inplace else copy_of(model)
        for module in list(network.modules()):
            if isinstance(module, FusedNetwork):
                take_off(module)
    return network


def copy_of(model: Network) -> Network:
    """A deep copy; a FusionError where the network refuses to be copied."""
    try:
        return copy.deepcopy(model)
    # Modules raise what they like.
    except Exception as error:
        raise FusionError(
            f"{type(model).__name__} cannot be copied ({error}); "
            "fuse and unfuse change it itself where they are called with inplace=True"
        ) from error


def _name_of(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _may_be_laid_over(module: nn.Module) -> bool:
    """Whether a module has convolutions, and a forward that can be followed."""
    return (
        kind_of(module) is None
        and not isinstance(module, (ConvNormAct, FusedNetwork, torch.jit.ScriptModule))
        and type(module).forward is not nn.Module.forward
        and not asks_own_class(type(module))
        and any(isinstance(part, nn.Conv2d) for part in module.modules())
    )
