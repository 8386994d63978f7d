"""Networks written to break `fused_cna.fuse`: the original's answers, and fused where that is safe."""

from __future__ import annotations

import re

import pytest
import torch
from torch import fx, nn

import fused_cna
from tests.fusion_cases import CASES, Case, Snapshot, compare
from tests.zoo.fused_calls import KINDS, FusedCall, recorded

every_case = pytest.mark.parametrize("case", CASES.values(), ids=str)

# Networks without batch norm, or whose parametrizations and hooks torch itself deprecates, say so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).*deprecated"),
    pytest.mark.filterwarnings("ignore:.*nn.functional.(sigmoid|tanh) is deprecated"),
    pytest.mark.filterwarnings("ignore:.*padding='same' with even kernel"),
]


def fuse(case: Case, network: nn.Module, way: str) -> nn.Module:
    if way == "alone":
        return fused_cna.fuse(network)
    arguments, _ = case.arguments(case.draws[0])
    try:
        return fused_cna.fuse(network, example_inputs=arguments)
    except fused_cna.FusionError as error:
        # What differs from run to run cannot be verified, which is said; all else has to pass.
        if "not deterministic" not in str(error):
            raise
        return fused_cna.fuse(network, example_inputs=arguments, verify=False)


@every_case
@pytest.mark.parametrize("way", ["alone", "with_inputs"])
def test_same_answers(case: Case, way: str) -> None:
    if way == "with_inputs" and case.keywords is not None:
        pytest.skip("example inputs are positional")
    network = case.build()
    before = Snapshot(network)
    fused = fuse(case, network, way)
    before.check(network)
    # Every graph module has a class of its own.
    assert isinstance(fused, fx.GraphModule if isinstance(network, fx.GraphModule) else type(network))
    assert list(fused.state_dict()) == list(network.state_dict())
    compare(case, fused, case.build())


def uses(parts: str | tuple[str, ...]) -> tuple[str, ...]:
    return (parts,) if isinstance(parts, str) else parts


def check_report(case: Case, fused: nn.Module) -> None:
    layers = fused_cna.report(fused).layers
    for name, parts in case.fused.items():
        records = [layer for layer in layers if layer.name == name]
        assert records, f"{name} is not in the report, which has {[layer.name for layer in layers]}"
        # Only those about padding say that it has to be taken in.
        found = {layer.parts.removeprefix("" if "pad" in uses(parts)[0] else "pad + ") for layer in records}
        assert found == set(uses(parts)), f"{name}: {records} instead of {parts}"
    for name, reason in case.unfused.items():
        records = [layer for layer in layers if layer.name == name]
        assert records, f"{name} is not in the report, which has {[layer.name for layer in layers]}"
        for record in records:
            assert not record.fused, f"{name} was fused as {record.parts}"
            assert record.reason, f"{name} was left alone without a reason"
            assert re.search(reason, record.reason), f"{name}: {record.reason!r} does not say {reason!r}"


def kinds_of(parts: str) -> tuple[bool, ...]:
    words = parts.split(" + ")
    return "norm" in words, not {"pad", "conv", "norm", "add"}.issuperset(words), "add" in words


def check_calls(case: Case, fused: nn.Module, calls: list[FusedCall]) -> None:
    """That what has to be fused is computed so, whatever the report says."""
    modules = {name: module for name, module in fused.named_modules() if isinstance(module, nn.Conv2d)}
    for name in case.fused.keys() & modules.keys():
        weight = modules[name].weight
        mine = [call for call in calls if call.conv in modules and modules[call.conv].weight is weight]
        found = [kinds for call in mine if any(kinds := tuple(map(call.has, KINDS)))]
        wanted = [kinds_of(parts) for parts in uses(case.fused[name]) if parts != "conv"]
        assert set(found) == set(wanted), f"{name} is computed as {mine}"
        assert len(found) == len(wanted) or isinstance(case.fused[name], str), f"{name} is computed as {mine}"


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.fused or case.unfused], ids=str)
def test_fused_where_it_is_safe(case: Case) -> None:
    fused = fused_cna.fuse(case.build())
    arguments, keywords = case.arguments(case.draws[0])
    with torch.no_grad(), recorded(fused) as calls:
        fused(*arguments, **keywords)
    check_report(case, fused)
    check_calls(case, fused, calls)
