"""Fused networks copied, stored, moved, converted, exported and compiled."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from tests.conftest import needs_gpu
from tests.fusion_cases import CASES, DRAWS, assert_equal_answers, assert_same, number_fused
from tests.fusion_cases.sums import Bottleneck
from tests.reference import DTYPES, library_bound, relative_error

TOLERANCE = 1e-10
# Classes of these are importable, so that they pickle: one that FX traces whole, and one that it does not.
every_network = pytest.mark.parametrize(
    "name", ["bottlenecks", "yolo_block", "branch_around_traceable_parts"]
)
traced_network = pytest.mark.parametrize("name", ["bottlenecks", "yolo_block"])
every_freeze = pytest.mark.parametrize("freeze", [False, True], ids=["live", "frozen"])


def image(seed: int = 0) -> Tensor:
    return DRAWS[seed].image()


def pair(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    plain = CASES[name].build().to(dtype)
    if not CASES[name].traceable:
        options["example_inputs"] = (image().to(dtype),)
    return fused_cna.fuse(plain, **options), plain


@every_network
@every_freeze
def test_deepcopy_is_independent(name: str, freeze: bool) -> None:
    fused, plain = pair(name, freeze=freeze)
    clone = copy.deepcopy(fused)
    assert type(clone) is type(fused)
    assert number_fused(clone) == number_fused(fused)
    assert_equal_answers(clone, plain)
    with torch.no_grad():
        for value in fused.parameters():
            value.zero_()
    assert_equal_answers(clone, plain)
    changed = fused_cna.unfuse(clone)
    with torch.no_grad():
        for network in (changed, plain):
            for value in network.parameters():
                value.mul_(1.3)
    assert_equal_answers(changed, plain)


@every_network
def test_a_copy_sees_its_own_changes(name: str) -> None:
    fused, plain = pair(name)
    clone = copy.deepcopy(fused)
    with torch.no_grad():
        for network in (clone, plain):
            for value in network.parameters():
                value.mul_(1.3)
    assert_equal_answers(clone, plain)


@every_network
@every_freeze
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_stored_and_loaded(name: str, freeze: bool, how: str) -> None:
    fused, plain = pair(name, freeze=freeze)
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(fused))
    else:
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded, type(plain))
    assert not loaded.training
    assert list(loaded.state_dict()) == list(plain.state_dict())
    assert number_fused(loaded) == number_fused(fused)
    assert_equal_answers(loaded, plain)
    assert type(fused_cna.unfuse(loaded)) is type(plain)
    again = pickle.loads(pickle.dumps(loaded))
    assert_equal_answers(again, plain)


@every_network
def test_stored_state_loads_into_the_plain_network_without_code(name: str) -> None:
    fused, plain = pair(name)
    buffer = io.BytesIO()
    torch.save(fused.state_dict(), buffer)
    buffer.seek(0)
    other = CASES[name].build()
    for value in other.parameters():
        value.data.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_equal_answers(other, plain)


@every_network
@every_freeze
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_converted(name: str, freeze: bool, dtype: torch.dtype) -> None:
    fused, plain = pair(name, freeze=freeze)
    fused = fused.to(dtype)
    assert {value.dtype for value in fused.parameters()} == {dtype}
    with torch.no_grad():
        exact, actual = plain(image()), fused(image().to(dtype))
        assert actual.dtype == dtype
        eager_error = relative_error(plain.to(dtype)(image().to(dtype)), exact)
        assert relative_error(actual, exact) <= library_bound(dtype, eager_error)


@every_network
@every_freeze
def test_on_meta(name: str, freeze: bool) -> None:
    """Shapes can be asked for without data, and weights come by assignment."""
    fused, plain = pair(name, freeze=freeze)
    on_meta = copy.deepcopy(fused).to("meta")
    assert all(value.is_meta for value in on_meta.parameters())
    if name != "branch_around_traceable_parts":
        assert on_meta(image().to("meta")).shape == plain(image()).shape
    if not freeze:
        on_meta.load_state_dict(plain.state_dict(), assign=True)
        assert_equal_answers(on_meta, plain)


@every_network
@every_freeze
@pytest.mark.gpu
def test_moved_and_replicated(name: str, freeze: bool) -> None:
    needs_gpu()
    fused, plain = pair(name, torch.float32, freeze=freeze)
    fused = fused.cuda()
    with torch.no_grad():
        assert_same(fused(image().float().cuda()).cpu(), plain(image().float()), 1e-2)
        replicas = torch.nn.parallel.replicate(fused, [0])
        assert_same(replicas[0](image().float().cuda()).cpu(), plain(image().float()), 1e-2)


@every_network
def test_data_parallel_replicas(name: str) -> None:
    """As DataParallel makes them: shallow, their parameters tensors of another device, set as attributes."""
    fused, plain = pair(name)
    modules = list(fused.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    tensors = {id(value): value.detach() * 1.5 for value in fused.state_dict(keep_vars=True).values()}
    for module, replica in replicas.items():
        for key, child in module._modules.items():
            replica._modules[key] = None if child is None else replicas[child]
        for key, value in module._parameters.items():
            if value is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, tensors[id(value)])
        for key, value in module._buffers.items():
            replica._buffers[key] = None if value is None else tensors.get(id(value), value)
    with torch.no_grad():
        for value in plain.state_dict().values():
            value.copy_(value * 1.5)
    assert_equal_answers(replicas[fused], plain)


@traced_network
@every_freeze
def test_export(name: str, freeze: bool) -> None:
    fused, plain = pair(name, torch.float32, freeze=freeze)
    argument = "input" if name == "bottlenecks" else "x"
    with torch.no_grad():
        exported = torch.export.export(
            fused,
            (image().float(),),
            dynamic_shapes={argument: {0: torch.export.Dim("batch", min=1, max=64)}},
        )
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for batch in (1, 3, 5):
        x = torch.randn(batch, 4, 8, 9)
        with torch.no_grad():
            assert_same(loaded(x), plain(x), 1e-4)


@traced_network
@every_freeze
@pytest.mark.parametrize("mode", ["no_grad", "grad", "inference"])
def test_compile_whole(name: str, freeze: bool, mode: str) -> None:
    fused, plain = pair(name, torch.float32, freeze=freeze)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    contexts = {"no_grad": torch.no_grad, "grad": torch.enable_grad, "inference": torch.inference_mode}
    for seed in (0, 1):
        x = image(seed).float()
        with contexts[mode]():
            assert_same(compiled(x), plain(x), 1e-4)


def test_compile_in_training_mode() -> None:
    fused, plain = pair("bottlenecks", torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(fused.train(), fullgraph=True, backend="aot_eager")
    plain.train()
    x = image().float()
    assert_same(compiled(x), plain(x), 1e-4)
    assert_same(dict(fused.state_dict()), dict(plain.state_dict()), 1e-4)


def test_compiled_networks_see_changes() -> None:
    fused, plain = pair("bottlenecks", torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = image().float()
    with torch.no_grad():
        assert_same(compiled(x), plain(x), 1e-4)
        for network in (fused, plain):
            for value in network.parameters():
                value.mul_(1.2)
        assert_same(compiled(x), plain(x), 1e-4)


@every_network
@every_freeze
def test_autocast(name: str, freeze: bool) -> None:
    fused, plain = pair(name, torch.float32, freeze=freeze)
    x = image().float()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = fused(x), plain(x)
        assert actual.dtype == expected.dtype
        assert_same(fused(x), plain(x), 1e-4)
        exact = plain.double()(x.double())
    eager_error = relative_error(expected, exact)
    assert relative_error(actual, exact) <= library_bound(torch.bfloat16, eager_error)


@every_network
@every_freeze
def test_inference_mode(name: str, freeze: bool) -> None:
    fused, plain = pair(name, freeze=freeze)
    with torch.inference_mode():
        actual = fused(image())
        assert actual.is_inference()
        assert_same(actual, plain(image()), TOLERANCE)
    with torch.inference_mode():
        made_inside, _ = pair(name, freeze=freeze)
        assert_same(made_inside(image()), plain(image()), TOLERANCE)


@traced_network
def test_channels_last(name: str) -> None:
    fused, plain = pair(name)
    fused, x = fused.to(memory_format=torch.channels_last), image().to(memory_format=torch.channels_last)
    with torch.no_grad():
        actual = fused(x)
        assert_same(actual, plain(x), TOLERANCE)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_functional_call_uses_the_given_parameters() -> None:
    fused, plain = pair("bottlenecks")
    state = {key: value * 1.5 for key, value in plain.state_dict().items()}
    with torch.no_grad():
        actual = torch.func.functional_call(fused, state, (image(),))
        expected = torch.func.functional_call(plain, state, (image(),))
    assert_same(actual, expected, TOLERANCE)


def test_swapped_tensors_are_seen() -> None:
    fused, plain = pair("bottlenecks")
    for network in (fused, plain):
        weight = network[0].conv1.weight
        torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 2))
    assert_equal_answers(fused, plain)


def test_moved_without_a_copy_of_the_parameters() -> None:
    """An optimizer made before fusing in place goes on training the same tensors."""
    plain = nn.Sequential(Bottleneck(4, 4, 1)).double().eval()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    reference = copy.deepcopy(plain)
    fused = fused_cna.fuse(plain, inplace=True)
    with torch.no_grad():
        before = fused(image())
    fused.train()(image()).square().sum().backward()
    optimizer.step()
    other = torch.optim.SGD(reference.parameters(), lr=0.1)
    reference.train()(image()).square().sum().backward()
    other.step()
    assert_equal_answers(fused.eval(), reference.eval(), 1e-8)
    with torch.no_grad():
        assert not torch.equal(fused(image()), before)
