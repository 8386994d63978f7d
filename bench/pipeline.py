"""Whole networks on real photographs: the same answers, and how long they take, before and after the swap."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.checks import NETWORK_ROOM, allowed_error, largest_image_error
from bench.photographs import crops, photographs
from bench.setting import Precision, Setting
from bench.stats import Summary, paired_ratio, summarize
from bench.timing import InputSets, Work, bound, captured, interleaved, rotating, stopwatch_for
from fused_cna import ConvNormAct
from fused_cna._device_timer import no_search

NETWORKS = ("mobilenet_v2", "efficientnet_b0")
IMAGE_SIZE = 224
CALIBRATION_BATCHES = 4
INPUT_SETS = 2
CALIBRATION_SEED = 1000
SMALLEST_CALIBRATION = 8


@dataclass(frozen=True)
class Latency:
    """Seconds per batch before and after the swap, and before / after by round, for one way of launching."""

    before: Summary
    after: Summary
    speedup: Summary


@dataclass(frozen=True)
class NetworkResult:
    """One network. Errors are the largest of an image, relative, on the logits."""

    network: str
    batch: int
    image_size: int
    layers_replaced: int
    convolutions: int
    fused_error: float
    eager_error: float
    fused_against_eager: float
    top1_agreement: float
    latency: dict[str, Latency]
    failure: str | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run(setting: Setting, step: Callable[[str], None]) -> list[NetworkResult]:
    """All networks but those that the budget leaves no time for."""
    results = []
    images = photographs()
    for name in NETWORKS:
        if not setting.budget.allows():
            break
        step(name)
        try:
            results.append(measure(name, images, setting, IMAGE_SIZE))
        except KeyboardInterrupt:
            setting.budget.interrupted = True
    return results


def measure(name: str, images: list[Tensor], setting: Setting, size: int) -> NetworkResult:
    """Build, calibrate, swap, compare and time one torchvision network on crops of `size` pixels."""
    batch = setting.batch_or(on_cpu=4, on_gpu=32)
    network = calibrated_network(name, images, max(batch, SMALLEST_CALIBRATION), size, setting)
    memory_format = torch.channels_last if setting.device.type == "cuda" else torch.contiguous_format
    eager = network.to(setting.dtype).to(memory_format=memory_format)
    fused = copy.deepcopy(eager)
    replaced = replace_layers(fused)
    input_sets: InputSets = [
        (
            crops(images, batch, size, setting.seed + index).to(
                setting.device, setting.dtype, memory_format=memory_format
            ),
        )
        for index in range(INPUT_SETS)
    ]
    with torch.inference_mode():
        with no_search():
            expected = _answers(copy.deepcopy(eager).double(), [(x.double(),) for (x,) in input_sets])
        before, after = _answers(eager, input_sets), _answers(fused, input_sets)
        latency = _time(eager, fused, input_sets, setting)
    fused_error, eager_error = largest_image_error(after, expected), largest_image_error(before, expected)
    return NetworkResult(
        network=name,
        batch=batch,
        image_size=size,
        layers_replaced=replaced,
        convolutions=sum(isinstance(module, nn.Conv2d) for module in eager.modules()),
        fused_error=fused_error,
        eager_error=eager_error,
        fused_against_eager=largest_image_error(after, before.double()),
        top1_agreement=float((after.argmax(1) == before.argmax(1)).double().mean()),
        latency=latency,
        failure=failure_of(fused_error, eager_error, setting.precision),
    )


def failure_of(fused_error: float, eager_error: float, precision: Precision) -> str | None:
    allowed = allowed_error(eager_error, precision, NETWORK_ROOM)
    if fused_error <= allowed:
        return None
    return f"wrong result: relative error {fused_error:.2e}, at most {allowed:.2e} is allowed"


def calibrated_network(name: str, images: list[Tensor], batch: int, size: int, setting: Setting) -> nn.Module:
    """A torchvision network with fixed random weights, whose norms have the statistics of these photographs.

    Untouched statistics (mean 0, variance 1) would let activations grow or vanish with depth, and a fold that
    is wrong would hardly show.
    """
    import torchvision

    torch.manual_seed(setting.seed)
    network = getattr(torchvision.models, name)(weights=None).eval().requires_grad_(False).to(setting.device)
    batches = [
        crops(images, batch, size, CALIBRATION_SEED + setting.seed + index).to(setting.device)
        for index in range(CALIBRATION_BATCHES)
    ]
    calibrate(network, batches)
    return network


@no_search()
def calibrate(network: nn.Module, batches: list[Tensor]) -> None:
    """Set every batch norm's running statistics to the mean over `batches`; the network ends in eval mode.

    Only the norms are in training mode: dropout and stochastic depth would falsify the statistics.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def replace_layers(network: nn.Module) -> int:
    """Put a ConvNormAct in place of every Conv2dNormActivation of `network`; how many there were."""
    from torchvision.ops.misc import Conv2dNormActivation

    replaced = 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv2dNormActivation):
                conv, norm, act = _parts(child)
                setattr(parent, name, ConvNormAct.from_modules(conv, norm, act).eval())
                replaced += 1
    return replaced


def _parts(layer: nn.Sequential) -> tuple[nn.Conv2d, nn.Module | None, nn.Module | None]:
    """The convolution, norm and activation of a Conv2dNormActivation; the last two may be missing."""
    conv, *rest = layer
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(
            f"the first module of a Conv2dNormActivation should be a Conv2d, got {type(conv).__name__}"
        )
    norm = next((module for module in rest if isinstance(module, nn.modules.batchnorm._BatchNorm)), None)
    others = [module for module in rest if module is not norm]
    if len(others) > 1:
        kinds = ", ".join(type(module).__name__ for module in layer)
        raise TypeError(
            f"a Conv2dNormActivation should hold a convolution, a norm and an activation, got {kinds}"
        )
    return conv, norm, others[0] if others else None


def _answers(network: nn.Module, input_sets: InputSets) -> Tensor:
    return torch.cat([network(*inputs) for inputs in input_sets])


def _time(eager: nn.Module, fused: nn.Module, input_sets: InputSets, setting: Setting) -> dict[str, Latency]:
    """Both networks by every way of launching, interleaved."""
    calls = {"before": bound(eager, input_sets), "after": bound(fused, input_sets)}
    works: dict[str, dict[str, Work]] = {
        "launched": {name: rotating(of_network) for name, of_network in calls.items()}
    }
    if setting.device.type == "cuda":
        works["graph"] = {name: captured(of_network).work for name, of_network in calls.items()}
    latency = {}
    for launch, pair in works.items():
        samples = interleaved(
            pair,
            stopwatch_for(setting.device),
            rounds=setting.effort.rounds,
            sample_seconds=setting.effort.sample_seconds,
            limit_seconds=setting.effort.network_limit_seconds,
        )
        latency[launch] = Latency(
            before=summarize(samples["before"]),
            after=summarize(samples["after"]),
            speedup=paired_ratio(samples["before"], samples["after"]),
        )
    return latency
