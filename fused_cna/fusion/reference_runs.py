"""Runs of a plain network from which errors of a fused one are measured."""

import copy
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from fused_cna.fusion import comparing
from fused_cna.fusion.boundaries import watch_convs
from fused_cna.fusion.records import FusionError

_ROUNDOFFS_REPEATED = 64.0


def dtype_of(network: nn.Module) -> torch.dtype:
    """That of the convolutions, else of the first parameter."""
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    parameters = [*weights, *network.parameters()]
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


def copied(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy in another dtype, or as it is for None; in eval mode where the network is in training mode."""
    made = copy.deepcopy(network)
    if dtype is not None:
        made.to(dtype)
    return made.eval() if network.training else made


def outputs_of(network: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype | None) -> dict[str, Any]:
    """The leaves of what a network returns, for copies of the inputs."""

    def leaf_copied(leaf: Any) -> Any:
        return comparing.copied(leaf, dtype) if isinstance(leaf, Tensor) else copy.deepcopy(leaf)

    arguments = _pytree.tree_map(leaf_copied, inputs)
    return dict(comparing.leaves(network(*arguments)))


class Run:
    """What the original's convolutions get in one run, and what it returns."""

    def __init__(self, original: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype | None) -> None:
        self.conv_inputs: list[tuple[str, Any]] = []
        self._by_name: dict[str, list[Any]] = {}
        network = copied(original, dtype)
        watch_convs(network, self._note)
        self.outputs = outputs_of(network, inputs, dtype)

    def _note(self, name: str, x: Any) -> None:
        kept = comparing.copied(x) if isinstance(x, Tensor) else x
        self.conv_inputs.append((name, kept))
        self._by_name.setdefault(name, []).append(kept)

    def error_of_input(self, name: str, call: int, x: Any) -> float:
        """How far the input of a convolution is from that in this run; infinite where it did not run."""
        calls = self._by_name.get(name, [])
        return comparing.error(x, calls[call]) if call < len(calls) else math.inf


def own_run(original: nn.Module, inputs: tuple[Any, ...]) -> Run:
    """A run in the original's own dtype, which has to work, and to repeat."""
    kind = type(original).__name__
    try:
        run = Run(original, inputs, None)
        repeated = outputs_of(copied(original, None), inputs, None)
    except Exception as error:
        raise FusionError(
            f"{kind} itself fails on example_inputs, so there is nothing to compare with: {error}"
        ) from error
    for path, leaf in run.outputs.items():
        allowed = _ROUNDOFFS_REPEATED * comparing.roundoff(leaf) if comparing.is_rounded(leaf) else 0.0
        difference = comparing.error(repeated[path], leaf) if path in repeated else math.inf
        if difference > allowed:
            raise FusionError(
                f"{kind} is not deterministic, so nothing can be compared with it: two runs of the original "
                f"on the same inputs differ in {path} by {difference:.2g}{_suspects(original)}"
            )
    return run


def _suspects(original: nn.Module) -> str:
    names = [
        f"{name} ({type(module).__name__})"
        for name, module in original.named_modules()
        if module.training and not original.training and "Drop" in type(module).__name__
    ]
    return f"; in training mode are {', '.join(names[:3])}" if names else ""


def try_run(original: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype) -> Run | None:
    """A run in a dtype that is not the network's own; None where its code prevents that."""
    try:
        return Run(original, inputs, dtype)
    # Code that is made for one dtype fails in any way it likes in another.
    except Exception as error:
        warnings.warn(
            f"{type(original).__name__} does not run in {words_of(dtype)}, so it is verified without: "
            f"{error}",
            stacklevel=4,
        )
        return None


def words_of(dtype: torch.dtype) -> str:
    """The name of a dtype."""
    return str(dtype).removeprefix("torch.")


def perturbed_outputs(
    original: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype | None, size: float, seed: int
) -> dict[str, Any]:
    """What a run returns whose convolutions get their inputs with random relative errors of a size."""
    network = copied(original, dtype)
    generators: dict[torch.device, torch.Generator] = {}

    def perturb(conv: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0]
        if x.device not in generators:
            generators[x.device] = torch.Generator(x.device).manual_seed(seed)
        noise = torch.randn(x.shape, generator=generators[x.device], device=x.device, dtype=x.dtype)
        return (x + x * noise * size, *args[1:])

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(perturb)
    return outputs_of(network, inputs, dtype)
