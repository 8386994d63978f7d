"""What people have reported of code that fuses, folds or swaps modules, each kind in a network of our own.

Modes that code asks for are in test_fuse_questions.py, call signatures in test_fuse_signatures.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, prune

import fused_cna
from fused_cna.fusion.overlay import FusedNetwork
from tests.fusion_cases import Group, assert_same, every_freeze, randomise
from tests.zoo.fused_calls import counted_frozen, recorded

TOLERANCE = 1e-5
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def prepared(network: nn.Module) -> Any:
    randomise(network)
    return network.eval()


def group() -> Any:
    torch.manual_seed(0)
    return prepared(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU()))


def answer(network: nn.Module, *arguments: Any) -> Tensor:
    with torch.no_grad():
        return network(*arguments or (X.clone(),))


def number_fused(network: nn.Module, *arguments: Any) -> int:
    """How many fused calls a run makes."""
    with recorded(network) as calls:
        answer(network, *arguments)
    return sum(call.has("norm") or call.has("act") for call in calls)


class UpCat(Group):
    """A decoder's block as MONAI has it: pads what does not fit the skip connection."""

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0)
        if skip is not None and torch.jit.isinstance(skip, Tensor):
            pad = [0] * 4
            for i in range(2):
                if skip.shape[-i - 1] != x.shape[-i - 1]:
                    pad[i * 2 + 1] = 1
            x = F.pad(x, pad, "replicate") + skip
        return super().forward(x)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up = Group(), Group(), UpCat()

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x)
        return self.up(self.down(F.max_pool2d(skip, 2)), skip)


@every_freeze
@pytest.mark.parametrize("size", [8, 9])
def test_decoders_that_pad_by_the_shapes_of_tensors(size: int, freeze: bool) -> None:
    plain = prepared(UNet())
    fused = fused_cna.fuse(plain, freeze=freeze)
    for x in (torch.randn(1, 4, size, size + 1), torch.randn(2, 4, size + 1, size)):
        assert_same(answer(fused, x), answer(plain, x), TOLERANCE)
    assert freeze or number_fused(fused) >= 2


def test_compiling_a_fused_network_leaves_it_fused() -> None:
    fused = fused_cna.fuse(group(), example_inputs=X)
    compiled = torch.compile(fused, backend="eager")
    assert number_fused(fused) == 1
    assert fused_cna.report(fused).as_written == ()
    assert_same(answer(compiled), answer(group()), TOLERANCE)
    assert number_fused(fused) == 1
    frozen = fused_cna.fuse(group(), freeze=True)
    before = answer(frozen)
    torch.compile(frozen, backend="eager")
    with counted_frozen() as run:
        assert torch.equal(answer(frozen), before)
    assert len(run) == 1


class Viewed(nn.Module):
    """A head that takes memory as it lies, behind a check that no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = group(), nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise ValueError("four channels, please")
        x = self.features(x)
        return self.head(x.view(x.size(0), -1))


@pytest.mark.parametrize("inputs", [None, X], ids=["alone", "with_inputs"])
@every_freeze
def test_results_lie_as_the_plain_networks_do(freeze: bool, inputs: Tensor | None) -> None:
    plain = prepared(Viewed())
    fused = fused_cna.fuse(plain, freeze=freeze, example_inputs=inputs)
    for network in (fused, fused_cna.unfuse(fused)):
        assert_same(answer(network), answer(plain), TOLERANCE)
    for x in (X, X.to(memory_format=torch.channels_last), X[:, :, ::2], X[:1], X.transpose(2, 3)):
        for one in (plain, copy.deepcopy(plain).to(memory_format=torch.channels_last)):
            made = fused_cna.fuse(one.features, freeze=freeze)
            assert answer(made, x).stride() == answer(one.features, x).stride()
    assert answer(fused.train()).shape == (2, 5)


class ResidualUnit(Group):
    """The unit of depth networks, whose addition can be quantised later."""

    def __init__(self) -> None:
        super().__init__()
        self.skip_add = nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip_add.add(self.norm(self.conv(self.act(x))), x)


def quantizable(fuse: bool) -> nn.Module:
    models = pytest.importorskip("torchvision.models.quantization")
    network = prepared(models.resnet18(weights=None, quantize=False))
    if fuse:
        network.fuse_model()
        network.eval()
    return network


def with_intrinsics() -> nn.Module:
    from torch.ao.nn import intrinsic

    network = nn.Sequential(
        intrinsic.ConvReLU2d(nn.Conv2d(4, 4, 3), nn.ReLU()),
        intrinsic.ConvBn2d(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        intrinsic.ConvBnReLU2d(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
    )
    return prepared(network)


FLOATS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "FloatFunctional": (lambda: prepared(ResidualUnit()), 1),
    "quantizable": (lambda: quantizable(False), 20),
    "quantizable, its modules fused": (lambda: quantizable(True), 9),
    "float modules of torch.ao": (with_intrinsics, 3),
}


@pytest.mark.parametrize(("make", "fused_calls"), FLOATS.values(), ids=FLOATS)
@pytest.mark.filterwarnings("ignore")
def test_what_may_be_quantised_later_is_a_float_network(make: Callable[[], Any], fused_calls: int) -> None:
    torch.manual_seed(0)
    plain = make()
    x = torch.randn(1, next(plain.parameters()).shape[1], 32, 32)
    fused = fused_cna.fuse(plain, example_inputs=x)
    assert_same(answer(fused, x), answer(plain, x), TOLERANCE)
    assert number_fused(fused, x) >= fused_calls


def save(network: nn.Module, folder: Path) -> None:
    pytest.importorskip("safetensors.torch").save_file(network.state_dict(), folder / "weights")


USES: dict[str, Callable[[Any, Path], object]] = {
    "safetensors": save,
    "parameters_to_vector": lambda network, folder: parameters_to_vector(network.parameters()),
    "pruning": lambda network, folder: prune.l1_unstructured(network[0], "weight", 0.5),
    "a view": lambda network, folder: network[0].weight.view(4, -1),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@every_freeze
def test_weights_lie_as_they_did(
    use: Callable[[Any, Path], object], inplace: bool, freeze: bool, tmp_path: Path
) -> None:
    plain = group()
    strides = {name: value.stride() for name, value in plain.state_dict().items()}
    fused = fused_cna.fuse(plain, example_inputs=X, freeze=freeze, inplace=inplace)
    for network in (fused, fused_cna.unfuse(fused)):
        assert {name: value.stride() for name, value in network.state_dict().items()} == strides
        use(network, tmp_path)
        assert_same(answer(network).shape, answer(group()).shape, 0)


@every_freeze
def test_threads_that_fuse_one_network(freeze: bool) -> None:
    """As servers do that load lazily, beside threads that copy and call it, or another network."""
    plain = prepared(nn.Sequential(*[group() for _ in range(4)]))
    shared, expected = copy.deepcopy(plain), answer(plain)

    def work(index: int) -> None:
        if index % 3 == 2:
            assert torch.equal(answer(plain), expected)
            return
        assert fused_cna.fuse(shared, inplace=True, freeze=freeze) is shared
        for one in (shared, copy.deepcopy(shared), plain, fused_cna.fuse(plain, freeze=freeze)):
            assert_same(answer(one), expected, TOLERANCE)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, index) for index in range(16)]:
            done.result()
    assert sum(FusedNetwork in kind.__bases__ for kind in type(shared).__mro__) == 1
    with counted_frozen() as frozen:
        assert number_fused(shared) == (0 if freeze else 4)
    assert len(frozen) == (4 if freeze else 0)
    assert type(fused_cna.unfuse(shared)) is nn.Sequential
