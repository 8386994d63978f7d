"""Whether a fused network computes what the original does: node by node, and at the end.

Each graph that runs is compared with the graph that was traced, run in float64 with the original's modules.
Then what the network returns is compared with what the original returns.

An error may be ``max(8 e, 64 u)`` in float32 and ``max(3 e, 16 u)`` in 16-bit types, with ``u`` the unit
roundoff and ``e`` the largest error up to there of the original itself, which is measured only where ``u``
alone does not do. So a network that amplifies rounding errors is allowed as much, and no more than that.
Of a result that differs by more, such as that of a detector where boxes of nearly the same score have changed
places, ``e`` is how much the original's changes with random errors in the inputs of its convolutions.
Of integers, one in a thousand may differ besides. A NaN on one side alone is a difference.
"""

import contextlib
import copy
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fused_cna.fusion.checks import does_not_run
from fused_cna.fusion.overlay import FusedNetwork, Overlay, state, take_off
from fused_cna.fusion.records import FusionError
from fused_cna.fusion.trace import left_as_it_is

# By dtype, how many times the original's error is allowed, and what is whatever that is.
_ALLOWED = {
    torch.float64: (8.0, 64 * 2.0**-53),
    torch.float32: (8.0, 64 * 2.0**-24),
    torch.float16: (3.0, 16 * 2.0**-11),
    torch.bfloat16: (3.0, 16 * 2.0**-8),
}
_ALLOWED_OF_INTEGERS = (8.0, 1e-3)
_TIMES_ERROR, _TRIALS = 3.0, 6


def verify_fused(network: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse a fused network, just made, that computes something else than the original on example inputs.

    Takes about three runs of the original, one of them in float64, and more where errors are large.

    Raises:
        FusionError: something differs: names the first layer that does, by how much, and what was allowed. Or
            the original does not run on the inputs.
    """
    with torch.no_grad():
        _Comparison(network, inputs).run()


class _Comparison:
    def __init__(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._network, self._inputs = network, inputs
        self._paths = {module: path for path, module in network.named_modules()}
        self._plain = copy.deepcopy(network)
        for module in [*self._plain.modules()]:
            if isinstance(module, FusedNetwork):
                take_off(module)
        self._exact = copy.deepcopy(self._plain).double()
        """The plain network itself once float64 has failed."""
        self._largest_error, self._after = 0.0, ""
        self._difference: tuple[str, float, float] | None = None
        """Where the first is, how large, and what is allowed."""

    def run(self) -> None:
        kind = type(self._plain).__name__
        try:
            own = self._outputs(self._plain)
        except Exception as error:
            raise FusionError(does_not_run(self._network, error)) from error
        state.observer = self._compare_nodes
        try:
            outputs = self._outputs(self._network)
        except Exception as error:
            message = f"the fused {kind} fails on example_inputs, where the original runs: {error}"
            raise FusionError(message) from error
        finally:
            del state.observer
        if self._difference is None:
            self._compare_outputs(outputs, own)
        if self._difference is not None:
            where, size, allowed = self._difference
            what = "another shape or dtype, or a NaN or infinity on one side"
            what = what if math.isinf(size) else f"relative error {size:.2g}, allowed is {allowed:.2g}"
            raise FusionError(
                f"the fused {kind} does not compute what the original does. The first difference: {where}: "
                f"{what}. fuse(..., verify=False) does not compare"
            )

    def _copies(self, inputs: Any, network: nn.Module) -> Any:
        """Inputs that a network may overwrite, in float64 for the exact one."""
        is_wide = network is self._exact is not self._plain

        def copied(x: Tensor) -> Tensor:
            return x.detach().to(torch.float64 if is_wide and x.is_floating_point() else x.dtype, copy=True)

        return pytree.tree_map_only(Tensor, copied, inputs)

    def _outputs(self, network: nn.Module) -> dict[str, Any]:
        """The leaves of what a network returns; it, and random numbers, are the same each time."""
        with left_as_it_is(network, of_tensors=True):
            return dict(_leaves(network(*self._copies(self._inputs, network))))

    def _compare_nodes(self, overlay: Overlay, network: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """The result of an overlay, whose nodes are compared with those of the graph that was traced."""
        path, modules = self._paths[network], dict(overlay.graph.named_modules())
        given, own_errors = self._copies(tensors, network), dict[fx.Node, float]()
        exact = self._traced_values(self._exact, overlay, path, given)
        inputs = (*tensors, *[operator.attrgetter(name)(network) for name in overlay.values])
        result, values = _run(overlay.graph, overlay.graph.graph, overlay.pairs, inputs)
        for node, value in values.items() if self._difference is None else ():
            if (twin := overlay.pairs[node]) not in exact:
                continue
            error, allowed = _error(value, exact[twin]), _allowed(value)
            if error > allowed and self._exact is self._plain:
                allowed = _allowed(value, 2 * allowed)
            elif error > allowed:
                # The error of the original itself is asked for only where it matters.
                if not own_errors:
                    own = self._traced_values(self._plain, overlay, path, given)
                    errors = (_error(own[one], exact[one]) for one in own)
                    own_errors = dict(zip(own, itertools.accumulate(errors, max), strict=True))
                allowed = _allowed(value, own_errors[twin])
            layer = getattr(modules.get(node.target), "group_name", "")
            layer = f"{path}.{layer}".strip(".") if layer else ""
            if error > allowed:
                self._difference = layer or node.name + self._after, error, allowed
                break
            self._largest_error = max(self._largest_error, error if math.isfinite(error) else 0.0)
            self._after = f", after {layer}" if layer else self._after
        return result

    def _traced_values(
        self, root: nn.Module, overlay: Overlay, path: str, tensors: Any
    ) -> dict[fx.Node, Tensor]:
        """What nodes of the graph that was traced give with the modules of the exact or the plain copy."""
        part = root.get_submodule(path)
        try:
            with left_as_it_is(part):
                return _run(part, overlay.plain, overlay.pairs.values(), self._copies(tensors, root))[1]
        # Code that is made for one dtype fails in another.
        except Exception:
            if root is self._plain:
                raise
            self._exact = self._plain
            return self._traced_values(self._plain, overlay, path, tensors)

    def _compare_outputs(self, outputs: dict[str, Any], own: dict[str, Any]) -> None:
        kinds = [
            {(path, getattr(leaf, "dtype", None)) for path, leaf in one.items()} for one in (outputs, own)
        ]
        if other := sorted({path for path, _ in kinds[0] ^ kinds[1]}):
            self._difference = f"the result, in {', '.join(other[:5])}", math.inf, 0.0
            return
        exact: dict[str, Any] = {}
        for path, value in outputs.items():
            error, own_error = _error(value, own[path]), 0.0
            if error > _allowed(value) and not exact:
                exact = own
                # Code that is made for one dtype fails in another.
                with contextlib.suppress(Exception):
                    exact = self._outputs(self._exact)
            # A fused network may be right where the original is not, as where 16-bit types overflow.
            error = min(error, _error(value, exact.get(path)))
            for seed in range(_TRIALS):
                if error > _allowed(value, own_error):
                    with _Noise(_TIMES_ERROR * self._largest_error, seed):
                        trial = self._outputs(self._plain)
                    own_error = max(own_error, _error(trial.get(path), own[path]))
            if error > (allowed := _allowed(value, own_error)):
                self._difference = f"{path} is not what the original returns", error, allowed
                return


class _Noise(TorchDispatchMode):
    """A context in which inputs of convolutions have random errors of a relative size, at least roundoffs."""

    def __init__(self, size: float, seed: int) -> None:
        super().__init__()
        self._size, self._seed = size, seed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, *others = args
            # The network's own random numbers stay as they are.
            generator = torch.Generator(x.device).manual_seed(self._seed)
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            args = (x + x * noise * max(self._size, torch.finfo(x.dtype).eps), *others)
        return func(*args, **(kwargs or {}))


def _run(
    root: nn.Module, graph: Any, nodes: Iterable[fx.Node], inputs: Sequence[Any]
) -> tuple[Any, dict[fx.Node, Tensor]]:
    """What a graph returns, and what some of its nodes give when they do."""
    values: dict[fx.Node, Tensor] = {}
    watched, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    watched.output(watched.graph_copy(graph, copies))
    by_name = {node.name: node for node in nodes if node.op.startswith("call")}

    def keep(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            values[by_name[name]] = value.clone()

    for name, node in by_name.items():
        with watched.inserting_after(copies[node]):
            watched.call_function(keep, (name, copies[node]))
    module = fx.GraphModule(root, watched)
    # Else they refer to each other, and the weights stay until the garbage collector comes by.
    module.graph.owning_module = None
    return module.forward(*inputs), values


def _leaves(value: Any, path: str = "output", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """What a result consists of, by where it is: tensors, which numbers become, and what holds no others."""
    items: list[Any] = []
    if isinstance(value, Tensor):
        value = value.detach().clone()
    elif isinstance(value, float) or getattr(getattr(value, "dtype", None), "kind", "") in (*"biufc",):
        value = torch.as_tensor(value, dtype=torch.float32 if type(value) is float else None)
    elif isinstance(value, Mapping):
        items = [*value.items()]
    elif isinstance(value, (tuple, list)):
        items = [*enumerate(value)]
    elif not callable(value):
        names = [*getattr(type(value), "__slots__", ()), *getattr(value, "__dict__", ())]
        items = [(name, getattr(value, name, None)) for name in names]
    if not items:
        yield path, value
    for key, item in items if id(value) not in above else ():
        yield from _leaves(item, f"{path}[{key!r}]", (*above, id(value)))


def _error(actual: Any, exact: Any) -> float:
    """How far a value is from the exact one: 0 where equal, infinite where it cannot be compared.

    The relative error in the Frobenius norm for floating-point numbers; the share of elements that differ for
    other tensors.
    """
    if not isinstance(actual, Tensor) or not isinstance(exact, Tensor):
        # Objects that compare by identity are two of a kind here: one of each network.
        by_identity: Any = object.__eq__
        is_same = type(actual).__eq__ is by_identity or bool(actual == exact)
        return 0.0 if type(actual) is type(exact) and is_same else math.inf
    is_rounded, is_complex = actual.is_floating_point(), actual.is_complex()
    if (actual.shape, is_rounded, is_complex) != (exact.shape, exact.is_floating_point(), exact.is_complex()):
        return math.inf
    if not is_rounded and not is_complex:
        return float((actual != exact).sum()) / max(actual.numel(), 1)
    wide = torch.complex128 if is_complex else torch.float64
    actual, exact = actual.to(wide), exact.to(wide)
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    size = torch.where(exact.isfinite(), exact, 0.0).norm().clamp_min(torch.finfo(torch.float64).tiny)
    error = float(torch.where(same, 0.0, actual - exact).norm() / size)
    return math.inf if math.isnan(error) else error


def _allowed(value: Any, own_error: float = 0.0) -> float:
    if isinstance(value, Tensor):
        times, least = _ALLOWED.get(value.dtype.to_real(), _ALLOWED_OF_INTEGERS)
        return max(times * own_error, least)
    return own_error
