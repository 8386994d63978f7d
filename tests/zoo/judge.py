"""One network: built, fused, run beside the original, and what of it was fused."""

import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fused_cna
from tests.zoo import fused_calls
from tests.zoo.calibrate import calibrate, randomise
from tests.zoo.catalogue import Entry, arguments_of, entry
from tests.zoo.compare import compare
from tests.zoo.dataflow import Flow, observe
from tests.zoo.fused_calls import KINDS, FusedCall
from tests.zoo.running import Run

# Images of another size come in another number.
OTHER_IMAGES = 3
# A part that is left out has to be seen far beyond what rounding may do.
SPOILED = 10

Fuse = Callable[[nn.Module, tuple[Any, ...]], nn.Module]


def fuse(network: nn.Module, arguments: tuple[Any, ...]) -> nn.Module:
    """Unverified: the judge compares by itself."""
    return fused_cna.fuse(network, example_inputs=arguments, verify=False)


def fuse_frozen(network: nn.Module, arguments: tuple[Any, ...]) -> nn.Module:
    return fused_cna.fuse(network, example_inputs=arguments, verify=False, freeze=True)


@dataclass
class Result:
    """What was found of one network; plain data."""

    name: str
    convolutions: int = 0
    pairs: int = 0
    fused_pairs: int = 0
    adds: int = 0
    fused_adds: int = 0
    fused_calls: int = 0
    """Fused calls in one run of the fused network."""
    frozen_calls: int = 0
    """Calls of frozen convolutions in one run of the frozen one."""
    wrong: list[str] = field(default_factory=list)
    """Where results, or what the network says of itself, are not what they have to be."""
    error: str = ""
    """What was raised; nothing else is known then."""
    missed_pairs: list[tuple[str, str]] = field(default_factory=list)
    """Convolutions of foldable pairs that were not fused, and the report's reason."""
    missed_adds: list[tuple[str, str]] = field(default_factory=list)
    """The convolutions that an unfused residual add takes, and the report's reason."""
    worst: float = 0.0
    """The largest error as a fraction of its bound."""
    spoiled: dict[str, float] = field(default_factory=dict)
    """For a norm, an activation and an addition left out on purpose: the error as a fraction of its bound."""

    @property
    def unseen(self) -> list[str]:
        """What could be left out without the comparison telling it from rounding."""
        return [kind for kind, error in self.spoiled.items() if error < SPOILED]


def judge(name: str, *, how: Fuse = fuse, frozen: Fuse | None = None) -> Result:
    """Everything about the network `name`; what it raises is part of the result.

    Args:
        how: makes the fused network whose results are compared and whose parts are counted.
        frozen: makes one more, of which only the results are compared.
    """
    result = Result(name)
    try:
        _Judge(entry(name), result).run(how, frozen)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = str(error).strip().split("\n")[0]
        result.error = f"{type(error).__name__} at {where.name}: {message}"
    return result


def prepare(which: Entry) -> nn.Module:
    """The network in eval mode, the same in every call."""
    torch.manual_seed(0)
    network = which.build().eval()
    generator = torch.Generator().manual_seed(1)
    randomise(network, generator)
    arguments = arguments_of(which, (which.size, which.size))
    calibrate(network, lambda: network(*arguments), generator)
    return network


class _Judge:
    def __init__(self, which: Entry, result: Result) -> None:
        self.which = which
        self.result = result

    def run(self, how: Fuse, frozen: Fuse | None) -> None:
        which, result = self.which, self.result
        network = prepare(which)
        inputs = [arguments_of(which, (which.size, which.size))]
        if which.other_size is not None:
            inputs.append(arguments_of(which, which.other_size, OTHER_IMAGES))
        flow = observe(network, inputs[0])
        result.convolutions, result.pairs, result.adds = flow.convolutions, len(flow.pairs), len(flow.adds)
        originals = [Run(network, which, arguments) for arguments in inputs]
        for original in originals:
            for name, tensor in original.results.items():
                assert not tensor.is_floating_point() or tensor.isfinite().all(), f"{name} is not finite"
        # In place and back, which is exact: a copy in float64 would be as large as three networks.
        network.double()
        exact = [
            Run(network, which, arguments, first) for arguments, first in zip(inputs, originals, strict=True)
        ]
        network.float()
        state = _state(network)

        fused = how(network, inputs[0])
        result.wrong += _changed(network, state)
        result.wrong += _other_names(fused, network)
        with fused_calls.recorded(fused) as calls:
            first = Run(fused, which, inputs[0], originals[0])
        result.fused_calls = len(calls)
        self._count(flow, calls, fused)
        self._compare("", first, originals[0], exact[0])
        for arguments, original, best in zip(inputs[1:], originals[1:], exact[1:], strict=True):
            self._compare("other images: ", Run(fused, which, arguments, original), original, best)
        self._spoil(fused, calls, inputs[0], originals[0], exact[0])
        if frozen is None:
            return
        del fused
        snapshot = frozen(network, inputs[0])
        result.wrong += _changed(network, state)
        for arguments, original, best in zip(inputs, originals, exact, strict=True):
            with fused_calls.counted_frozen() as frozen_calls:
                run = Run(snapshot, which, arguments, original)
            result.frozen_calls = len(frozen_calls)
            self._compare("frozen: ", run, original, best)

    def _compare(self, what: str, run: Run, original: Run, exact: Run) -> None:
        verdict = compare(run.results, original.results, exact.results)
        self.result.wrong += [what + wrong for wrong in verdict.wrong]
        self.result.worst = max(self.result.worst, verdict.worst)

    def _count(self, flow: Flow, calls: list[FusedCall], fused: nn.Module) -> None:
        """What was fused, by the calls that were made; the report is asked for reasons only."""
        result = self.result
        made: dict[str, list[FusedCall]] = {}
        for call in calls:
            made.setdefault(call.conv, []).append(call)
        whole = {name: some for name, some in made.items() if len(some) == flow.calls.get(name)}
        normed = {
            name
            for name, norm in flow.pairs.items()
            if name in whole and all(call.norm == norm for call in whole[name])
        }
        added = {name for name, some in whole.items() if all(call.has_residual for call in some)}
        reported = reasons_of(fused)
        result.fused_pairs = len(normed)
        result.fused_adds = sum(any(name in added for name in names) for names in flow.adds)
        result.missed_pairs = [
            (name, reported.get(name, "not in the report")) for name in flow.pairs if name not in normed
        ]
        result.missed_adds = [
            (" and ".join(names), "; ".join(reported.get(name, "not in the report") for name in names))
            for names in sorted(flow.adds)
            if not any(name in added for name in names)
        ]

    def _spoil(
        self,
        fused: nn.Module,
        calls: list[FusedCall],
        arguments: tuple[Any, ...],
        original: Run,
        exact: Run,
    ) -> None:
        """Leaves out one part of each kind, of a convolution chosen by chance."""
        choose = random.Random(2)
        for kind in KINDS:
            candidates = [call for call in calls if call.has(kind)]
            if candidates:
                with fused_calls.spoiled(fused, choose.choice(candidates), kind):
                    run = Run(fused, self.which, arguments, original)
                self.result.spoiled[kind] = compare(run.results, original.results, exact.results).worst


def reasons_of(fused: nn.Module) -> dict[str, str]:
    """By convolution, what the report says is computed with it, and why not more."""
    reasons: dict[str, str] = {}
    for layer in fused_cna.report(fused).layers:
        said = f"{layer.parts}: {layer.reason or 'no reason'}"
        if said not in reasons.get(layer.name, ""):
            reasons[layer.name] = f"{reasons[layer.name]} | {said}" if layer.name in reasons else said
    return reasons


def _state(network: nn.Module) -> dict[str, tuple[object, ...]]:
    """What changes wherever a parameter or buffer is written, exchanged or laid out anew."""
    return {
        name: (id(tensor), tensor.data_ptr(), tensor.stride(), tensor._version)
        for name, tensor in network.state_dict(keep_vars=True).items()
    }


def _changed(network: nn.Module, before: dict[str, tuple[object, ...]]) -> list[str]:
    now = _state(network)
    names = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    return [f"fuse changed the original: {', '.join(sorted(names)[:3])}"] if names else []


def _other_names(fused: nn.Module, network: nn.Module) -> list[str]:
    """The fused network's `state_dict` has to be the original's."""
    mine, theirs = fused.state_dict(), network.state_dict()
    if list(mine) == list(theirs) and all(mine[name].shape == theirs[name].shape for name in mine):
        return []
    return [f"its state_dict differs: {', '.join(sorted(mine.keys() ^ theirs.keys())[:3]) or 'the order'}"]
