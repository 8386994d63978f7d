"""What `fused_cna.fuse` refuses, and says; and that the network it was given stays as it was."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fused_cna
from tests.fusion_cases import CASES, Group, Snapshot, assert_equal_answers, assert_same, conv, image


def group() -> Any:
    return CASES["add_plus"].build()


def quantised() -> nn.Module:
    """A network with a dynamically quantised layer beside the convolution."""
    network = nn.Sequential(Group(), nn.Flatten(), nn.Linear(288, 4)).eval()
    return torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, torch.qint8)


def prepared_for_quantisation() -> nn.Module:
    """Observers beside every layer record what passes: fusing would take it from them."""
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).train()
    network.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(network).eval()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "meta": (lambda: Group().eval().to("meta"), r"(?s)meta.*(to_empty|load|materiali|before)"),
    "mixed_devices": (lambda: nn.Sequential(Group(), Group().to("meta")).eval(), "meta"),
    "quantised": (quantised, "(?i)quanti"),
    "quantised_convolution": (lambda: nn.Sequential(torch.ao.nn.quantized.Conv2d(4, 4, 3)), "(?i)quanti"),
    "prepared_for_quantisation": (prepared_for_quantisation, "(?i)quanti|observ"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3))), "(?is)script.*before"),
    "traced_by_jit": (
        lambda: torch.jit.trace(Group().eval(), torch.zeros(1, 4, 8, 8)),
        "(?is)script.*before",
    ),
    "exported": (lambda: torch.export.export(Group().eval(), (torch.zeros(1, 4, 8, 8),)), "ExportedProgram"),
    "class": (lambda: Group, r"(?i)class|instance|Group\(\)"),
    "tensor": (lambda: torch.zeros(2), r"(?i)nn\.Module.*Tensor|Tensor.*nn\.Module"),
    "none": (lambda: None, r"(?i)nn\.Module.*None|None.*nn\.Module"),
    "state_dict": (lambda: Group().state_dict(), r"(?i)nn\.Module"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.filterwarnings("ignore")
def test_refused(make: Callable[[], Any], words: str, inplace: bool) -> None:
    given = make()
    snapshot = None
    # A quantised network has more than tensors in its state_dict, and a script makes new ones each time.
    if isinstance(given, nn.Module) and not isinstance(given, torch.jit.ScriptModule):
        values = given.state_dict().values()
        if all(isinstance(value, Tensor) and not value.is_quantized for value in values):
            snapshot = Snapshot(given)
    with pytest.raises((fused_cna.FusionError, TypeError), match=words):
        fused_cna.fuse(given, inplace=inplace)
    if snapshot is not None:
        snapshot.check(given)


EXAMPLES = {
    "number": 3,
    "text": "image",
    "module": nn.Identity(),
    "shape": (1, 4, 8, 9),
    "too_few_channels": (torch.zeros(1, 3, 8, 9),),
    "too_few_dimensions": (torch.zeros(8, 9),),
    "too_many": (torch.zeros(1, 4, 8, 9), torch.zeros(1, 4, 8, 9)),
    "none": (),
    "another_dtype": (torch.zeros(1, 4, 8, 9, dtype=torch.float16),),
    "on_meta": (torch.zeros(1, 4, 8, 9, device="meta"),),
}


@pytest.mark.parametrize("example_inputs", EXAMPLES.values(), ids=EXAMPLES)
@pytest.mark.parametrize("name", ["add_plus", "branch_on_values"])
def test_example_inputs_refused(example_inputs: Any, name: str) -> None:
    network = CASES[name].build()
    snapshot = Snapshot(network)
    for verify in (False, True):
        with pytest.raises((fused_cna.FusionError, TypeError, ValueError), match="example_inputs"):
            fused_cna.fuse(network, example_inputs=example_inputs, verify=verify)
    snapshot.check(network)


def test_example_inputs_of_one_tensor() -> None:
    """A single tensor stands for itself; a tuple for positional arguments."""
    network = CASES["branch_on_values"].build()
    for inputs in (image(), (image(),)):
        assert_equal_answers(fused_cna.fuse(network, example_inputs=inputs), network)


def test_what_no_copy_can_be_made_of_can_be_fused_in_place() -> None:
    """A weight that was computed with gradients on, as pruning leaves it, does not deep-copy."""
    network, plain = group(), group()
    for each in (network, plain):
        prune.l1_unstructured(each.conv, "weight", 0.5)
    snapshot = Snapshot(network)
    for ask in (fused_cna.fuse, fused_cna.report):
        with pytest.raises(fused_cna.FusionError, match="inplace=True"):
            ask(network)
    snapshot.check(network)
    assert_equal_answers(fused_cna.fuse(network, inplace=True), plain)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_modules_get_their_sizes_from_the_first_call() -> None:
    network = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    fused = fused_cna.fuse(network)
    results = []
    for each in (network, fused):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(each(image().float()))
    assert_same(results[1], results[0], 1e-5)
    assert list(fused.state_dict()) == list(network.state_dict())


def test_training_mode_is_fused_and_says_that_it_stays_live() -> None:
    network = group().train()
    snapshot = Snapshot(network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused = fused_cna.fuse(network)
    snapshot.check(network)
    assert fused.training
    assert fused.norm.training
    words = " ".join(str(warning.message) for warning in caught) + str(fused_cna.report(fused))
    assert "train" in words
    assert_equal_answers(fused.eval(), group())
    assert fused_cna.report(fused).layers[0].fused


@pytest.mark.parametrize("network", [nn.Linear(4, 3).eval(), nn.Sequential().eval()], ids=["linear", "empty"])
def test_without_convolutions(network: nn.Module) -> None:
    snapshot = Snapshot(network)
    fused = fused_cna.fuse(network)
    snapshot.check(network)
    report = fused_cna.report(fused)
    assert not report.layers
    assert "no convolution" in str(report).lower()
    x = torch.randn(2, 4)
    assert_same(fused(x), network(x), 0)


def test_unfuse_of_what_was_not_fused() -> None:
    network = group()
    snapshot = Snapshot(network)
    plain = fused_cna.unfuse(network)
    snapshot.check(network)
    assert_equal_answers(plain, network, 0)
    with pytest.raises((fused_cna.FusionError, TypeError), match=r"nn\.Module"):
        fused_cna.unfuse(3)


class Doubled(nn.Module):
    """A convolution whose result is normalised, and used besides."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.norm, self.last = conv(), nn.BatchNorm2d(4), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(x)
        return self.last(self.norm(y) * y)


STRICT: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    **{
        name: (CASES[name].build, ["conv"])
        for name in (
            "conv_output_twice",
            "conv_output_returned",
            "norm_in_training_mode",
            "parametrized_halved",
            "conv_standardised",
        )
    },
    "several": (lambda: nn.Sequential(Doubled(), Doubled()).double().eval(), ["0.gate", "1.gate"]),
}


@pytest.mark.parametrize(("make", "layers"), STRICT.values(), ids=STRICT)
@pytest.mark.parametrize("inputs", [None, image()], ids=["alone", "with_inputs"])
def test_strict_names_the_layers_and_no_other(
    make: Callable[[], nn.Module], layers: list[str], inputs: Tensor | None
) -> None:
    network = make()
    for inplace in (False, True):
        # Statistics that a run writes are put back.
        snapshot = Snapshot(network, of_versions=inputs is None)
        with pytest.raises(fused_cna.FusionError) as raised:
            fused_cna.fuse(network, strict=True, inplace=inplace, example_inputs=inputs)
        assert re.findall(r"^ +([\w.]+): ", str(raised.value), re.MULTILINE) == layers
        snapshot.check(network)


@pytest.mark.parametrize(
    "name", ["add_plus", "conv_alone", "norm_first", "norm_group", "transposed", "shared_conv"]
)
def test_strict_passes_where_all_that_looked_fusible_was(name: str) -> None:
    """A bare convolution, or a norm that no kernel folds, does not look fusible."""
    case = CASES[name]
    assert_equal_answers(fused_cna.fuse(case.build(), strict=True), case.build())
