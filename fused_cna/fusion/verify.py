"""Whether a fused network computes what the original does: node by node, and at the end.

Each graph that runs is walked beside the graph that was traced, in float64 and of the original's modules:
what a node of the one gives is compared with the node of the other that it stands for. Then what the network
returns is compared with what the original returns.

An error may be ``max(8 e, 64 u)`` in float32 and ``max(3 e, 16 u)`` in 16-bit types, with ``u`` the unit
roundoff and ``e`` the largest error up to there of the original itself, which is measured only where ``u``
alone does not do. So a network that amplifies rounding errors is allowed as much, and no more than that.
A result that differs by more, such as that of a detector where boxes of nearly the same score have changed
places, may differ as much as those of the original with inputs of convolutions that have random errors.
Of integers, one in a thousand may differ besides. A NaN on one side alone is a difference.
"""

import contextlib
import copy
import dataclasses
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fused_cna.fusion.checks import does_not_run
from fused_cna.fusion.overlay import NAME, FusedNetwork, Overlay, state, take_off
from fused_cna.fusion.records import FusionError
from fused_cna.fusion.trace import left_as_it_is

_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
_TIMES_OWN_ERROR, _ROUNDOFFS = 8.0, 64.0
_TIMES_OWN_ERROR_16_BIT, _ROUNDOFFS_16_BIT = 3.0, 16.0
_ROUNDOFFS_UNMEASURED = 1000.0
_INTEGERS = 1e-3
_TIMES_ERROR, _TRIALS = 3.0, 6


def verify_fused(network: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse a fused network that computes something else than the original on example inputs.

    Takes about three runs of the original, one of them in float64, and more where errors are large. Copies of
    the network are run in eval mode, except for the fused one, which is left as it was.

    Args:
        network: what :func:`fuse` made, with overlays that keep the graph that they were made of.
        inputs: the arguments of a call.

    Raises:
        FusionError: something differs: names the first layer that does, by how much, and what was allowed. Or
            the original does not run on the inputs.
    """
    with torch.no_grad(), left_as_it_is(network, of_tensors=True):
        _Comparison(network, inputs).run()


class _Comparison:
    def __init__(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._network, self._inputs = network, inputs
        self._plain = _plain_copy(network)
        self._kind = type(self._plain).__name__
        self._paths = {id(module): path for path, module in network.named_modules()}
        self._exact: nn.Module | None = _plain_copy(network).double()
        self._largest_error = self._largest_own_error = 0.0
        self._last = ""
        self._first_difference = ""

    def run(self) -> None:
        try:
            own = _outputs(self._plain, self._inputs)
        except Exception as error:
            raise FusionError(does_not_run(self._network, error)) from error
        state.observer = self._walk
        try:
            outputs = _outputs(self._network, self._inputs)
        except Exception as error:
            raise FusionError(
                f"the fused {self._kind} fails on example_inputs, where the original runs{self._after()}: "
                f"{error}"
            ) from error
        finally:
            del state.observer
        if not self._first_difference:
            self._compare_outputs(outputs, own)
        if self._first_difference:
            raise FusionError(
                f"the fused {self._kind} does not compute what the original does. The first difference: "
                f"{self._first_difference}. fuse(..., verify=False) does not compare"
            )

    def _walk(self, overlay: Overlay, network: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """The result of an overlay, whose nodes are compared with those of the graph that was traced."""
        if overlay.plain is None:
            return overlay(network, tensors)
        path = self._paths[id(network)]
        exact = self._plain_walk(overlay, path, tensors, torch.float64)
        own = None
        walk = _Walk(overlay.graph, overlay.graph.graph, overlay.pairs)
        values = [_held(network, value) for value in overlay.values]
        result = walk.run(*tensors, *values)
        for node, value in walk.kept.items():
            found = overlay.pairs[node]
            reference = exact.get(found)
            if reference is None:
                continue
            error, allowed = _error(value, reference), _allowed(value, 0.0)
            if error > allowed:
                # The error of the original itself is asked for only where it matters.
                own = own if own is not None else self._own_errors(overlay, path, tensors, exact)
                allowed = _allowed(value, own.get(found, 0.0))
            self._largest_error = max(self._largest_error, error if math.isfinite(error) else 0.0)
            name = self._name(overlay, node, path)
            if error > allowed and not self._first_difference:
                self._first_difference = f"{name or node.name + self._after()}: {_numbers(error, allowed)}"
            self._last = name or self._last
        return result

    def _plain_walk(
        self, overlay: Overlay, path: str, tensors: Sequence[Tensor], dtype: torch.dtype | None
    ) -> dict[fx.Node, Any]:
        """What the nodes of the graph that was traced give; nothing where they do not run in a dtype."""
        root = self._exact if dtype is not None else self._plain
        if root is None or overlay.plain is None:
            return {}
        kept = set(overlay.pairs.values())
        devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
        try:
            # Each walk draws the same random numbers.
            with torch.random.fork_rng(devices):
                walk = _Walk(root.get_submodule(path), overlay.plain, kept)
                walk.run(*(_copied(tensor, dtype) for tensor in tensors))
        # Code that is made for one dtype fails in another.
        except Exception:
            if dtype is None:
                raise
            self._exact = None
            return self._plain_walk(overlay, path, tensors, None)
        return walk.kept

    def _own_errors(
        self, overlay: Overlay, path: str, tensors: Sequence[Tensor], exact: dict[fx.Node, Any]
    ) -> dict[fx.Node, float]:
        """The largest error of the original up to each node."""
        errors, largest = {}, 0.0
        for node, value in self._plain_walk(overlay, path, tensors, None).items():
            largest = max(largest, _error(value, exact[node]) if node in exact else 0.0)
            errors[node] = largest
        self._largest_own_error = max(self._largest_own_error, largest)
        return errors

    def _name(self, overlay: Overlay, node: fx.Node, path: str) -> str:
        block = overlay.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        name = getattr(block, "group_name", "")
        return f"{path}.{name}".strip(".") if name else ""

    def _after(self) -> str:
        return f", after {self._last}" if self._last else ""

    def _compare_outputs(self, outputs: dict[str, Any], own: dict[str, Any]) -> None:
        if list(outputs) != list(own):
            only = sorted(set(outputs) ^ set(own))
            self._first_difference = f"the result has other parts: {', '.join(only[:5])}"
            return
        exact: dict[str, Any] | None = None
        for path, leaf in outputs.items():
            error, allowed = _error(leaf, own[path]), _allowed(leaf, 0.0)
            if error <= allowed:
                continue
            exact = self._exact_outputs() if exact is None else exact
            if path in exact:
                own_error = max(_error(own[path], exact[path]), self._largest_own_error)
                error, allowed = _error(leaf, exact[path]), _allowed(leaf, own_error)
            else:
                allowed = allowed * _ROUNDOFFS_UNMEASURED / _ROUNDOFFS
            if error > allowed:
                allowed = _allowed(leaf, self._sensitivity(path, own[path]))
            if error > allowed:
                self._first_difference = (
                    f"{path} is not what the original returns: {_numbers(error, allowed)}"
                )
                return

    def _exact_outputs(self) -> dict[str, Any]:
        try:
            return {} if self._exact is None else _outputs(self._exact, self._inputs, torch.float64)
        # Code that is made for one dtype fails in another.
        except Exception:
            return {}

    def _sensitivity(self, path: str, own: Any) -> float:
        """How much of a result is decided by errors of the size of those that the fused network makes."""
        size = _TIMES_ERROR * max(self._largest_error, _ROUNDOFF[torch.float32])
        found = [0.0]
        for seed in range(_TRIALS):
            network = copy.deepcopy(self._plain)
            generators: dict[torch.device, torch.Generator] = {}

            def perturb(conv: nn.Module, args: Any, seed: int = seed, generators: Any = generators) -> Any:
                x = args[0]
                generator = generators.setdefault(x.device, torch.Generator(x.device).manual_seed(seed))
                noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                return (x + x * noise * size, *args[1:])

            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_pre_hook(perturb)
            found.append(_error(_outputs(network, self._inputs).get(path), own))
        return max(found)


class _Walk(fx.Interpreter):
    """A run of a graph that keeps what some of its nodes give."""

    def __init__(self, module: nn.Module, graph: fx.Graph, keep: Any) -> None:
        super().__init__(module, graph=graph)
        self._keep = keep
        self.kept: dict[fx.Node, Any] = {}

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        return _mutable(super().fetch_args_kwargs_from_env(n))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._keep and isinstance(value, Tensor) and n.op not in ("placeholder", "get_attr"):
            # What is overwritten later is compared as it was.
            self.kept[n] = _copied(value)
        return value


def _mutable(value: Any) -> Any:
    """Containers as code makes them: those of a graph refuse to be changed."""
    if isinstance(value, dict):
        return {name: _mutable(one) for name, one in value.items()}
    if isinstance(value, list) or type(value) is tuple:
        return (list if isinstance(value, list) else tuple)(map(_mutable, value))
    return value


def _plain_copy(network: nn.Module) -> nn.Module:
    made = copy.deepcopy(network)
    for module in list(made.modules()):
        if isinstance(module, FusedNetwork):
            take_off(module)
    return made


def _held(network: nn.Module, path: str) -> Any:
    *owners, name = path.split(".")
    return getattr(network.get_submodule(".".join(owners)), name)


def _copied(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy that later writes do not reach; in ``dtype`` where it is a tensor of floating-point numbers."""
    return value.detach().to(dtype if value.is_floating_point() else None, copy=True)


def _outputs(network: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The leaves of what a network returns for copies of inputs; random numbers are the same each time."""
    arguments = pytree.tree_map(
        lambda leaf: _copied(leaf, dtype) if isinstance(leaf, Tensor) else copy.deepcopy(leaf), inputs
    )
    torch.manual_seed(0)
    random.seed(0)
    return dict(_leaves(network(*arguments)))


def _leaves(value: Any, path: str = "output", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """What a result consists of, by the expression that gives it: tensors, and what holds no others."""
    items: Any = None
    if isinstance(value, Tensor) or id(value) in above:
        pass
    elif hasattr(value, "__array__") and value.dtype.kind in "biufc":
        value = torch.as_tensor(value)
    elif isinstance(value, Mapping):
        items = ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (tuple, list)):
        items = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif hasattr(value, "__dict__") and not callable(value):
        fields = (
            [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else vars(value)
        )
        items = ((f"{path}.{name}", getattr(value, name)) for name in fields)
    if items is None:
        yield path, value
        return
    for name, item in items:
        yield from _leaves(item, name, (*above, id(value)))


def _error(actual: Any, exact: Any) -> float:
    """How far a value is from the exact one: 0 where equal, infinite where it cannot be compared.

    The relative error in the Frobenius norm for floating-point numbers; the share of elements that differ for
    other tensors.
    """
    if isinstance(actual, float) and isinstance(exact, float):
        actual, exact = torch.tensor(actual), torch.tensor(exact, dtype=torch.float64)
    if not isinstance(actual, Tensor) or not isinstance(exact, Tensor):
        # Objects that compare by identity are two of a kind here: one of each network.
        by_identity: Any = object.__eq__
        same = type(actual).__eq__ is by_identity or bool(actual == exact)
        return 0.0 if type(actual) is type(exact) and same else math.inf
    if actual.shape != exact.shape or _is_rounded(actual) != _is_rounded(exact):
        return math.inf
    if not actual.numel():
        return 0.0
    if not _is_rounded(actual):
        return float((actual != exact).double().mean())
    if actual.is_complex():
        actual, exact = torch.view_as_real(actual), torch.view_as_real(exact)
    actual, exact = actual.double(), exact.double()
    difference = torch.where(actual == exact, 0.0, actual - exact)
    both = actual.isnan() & exact.isnan()
    size = torch.where(exact.isfinite(), exact, 0.0).norm()
    error = float(torch.where(both, 0.0, difference).norm() / size.clamp_min(torch.finfo(torch.float64).tiny))
    return math.inf if math.isnan(error) else error


def _is_rounded(leaf: Any) -> bool:
    return isinstance(leaf, float) or (
        isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    )


def _allowed(leaf: Any, own_error: float) -> float:
    if not _is_rounded(leaf):
        return max(_TIMES_OWN_ERROR * own_error, _INTEGERS) if isinstance(leaf, Tensor) else 0.0
    roundoff = _ROUNDOFF.get(leaf.dtype if isinstance(leaf, Tensor) else torch.float32, 2.0**-24)
    if roundoff >= _ROUNDOFF[torch.float16]:
        return max(_TIMES_OWN_ERROR_16_BIT * own_error, _ROUNDOFFS_16_BIT * roundoff)
    return max(_TIMES_OWN_ERROR * own_error, _ROUNDOFFS * roundoff)


def _numbers(error: float, allowed: float) -> str:
    if math.isinf(error):
        return "another shape or dtype, or a NaN or infinity on one side"
    return f"relative error {error:.2g}, allowed is {allowed:.2g}"


@contextlib.contextmanager
def keeping_plain_graphs(network: nn.Module) -> Iterator[None]:
    """A context in which overlays keep the graph that they are made of; behind it they have none."""
    state.keeps_plain = True
    try:
        yield
    finally:
        state.keeps_plain = False
        for module in network.modules():
            for overlay in getattr(module.__dict__.get(NAME), "made", {}).values():
                if isinstance(overlay, Overlay):
                    overlay.plain, overlay.pairs = None, {}
