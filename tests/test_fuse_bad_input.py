"""What `fused_cna.fuse` refuses, and says; and that the network it was given stays as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fused_cna
from tests.fusion_cases import CASES, DRAWS, Group, Snapshot, assert_same
from tests.fusion_cases.sums import Bottleneck


def group() -> Any:
    return CASES["add_plus"].build()


def image() -> Tensor:
    return DRAWS[0].image()


def quantised() -> nn.Module:
    """A network with a dynamically quantised layer beside the convolution."""
    network = nn.Sequential(Group(), nn.Flatten(), nn.Linear(288, 4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, torch.qint8)


def quantised_convolution() -> nn.Module:
    from torch.ao.nn import quantized

    return nn.Sequential(quantized.Conv2d(4, 4, 3, padding=1), nn.ReLU()).eval()


def prepared_for_quantisation() -> nn.Module:
    """Observers beside every layer record what passes: fusing would take it from them."""
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        return torch.ao.quantization.prepare_qat(network).eval()


def mixed_devices() -> nn.Module:
    network = nn.Sequential(Group(), Group()).eval()
    network[1].to("meta")
    return network


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()).eval())


def traced_by_jit() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Group().eval(), torch.zeros(1, 4, 8, 8))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "meta": (lambda: Group().eval().to("meta"), r"(?s)meta.*(to_empty|load|materiali|before)"),
    "mixed_devices": (mixed_devices, r"meta"),
    "quantised": (quantised, r"(?i)quanti"),
    "quantised_convolution": (quantised_convolution, r"(?i)quanti"),
    "prepared_for_quantisation": (prepared_for_quantisation, r"(?i)quanti|observ"),
    "scripted": (scripted, r"(?is)script.*before"),
    "traced_by_jit": (traced_by_jit, r"(?is)script.*before"),
    "exported": (lambda: torch.export.export(Group().eval(), (torch.zeros(1, 4, 8, 8),)), r"ExportedProgram"),
    "class": (lambda: Group, r"(?i)class|instance|Group\(\)"),
    "function": (lambda: lambda x: x, r"(?i)nn\.Module"),
    "tensor": (lambda: torch.zeros(2), r"(?i)nn\.Module.*Tensor|Tensor.*nn\.Module"),
    "none": (lambda: None, r"(?i)nn\.Module.*None|None.*nn\.Module"),
    "state_dict": (lambda: Group().state_dict(), r"(?i)nn\.Module"),
    "list": (lambda: [Group()], r"(?i)nn\.Module.*(list|\[)"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_refused(make: Callable[[], Any], words: str, inplace: bool) -> None:
    given = make()
    snapshot = None
    if isinstance(given, nn.Module) and not isinstance(given, torch.jit.ScriptModule):
        tensors = given.state_dict(keep_vars=True).values()
        snapshot = (
            Snapshot(given)
            if all(isinstance(value, Tensor) and not value.is_quantized for value in tensors)
            else None
        )
    with pytest.raises((fused_cna.FusionError, TypeError), match=words) as caught:
        fused_cna.fuse(given, inplace=inplace)
    assert len(str(caught.value)) < 1000
    if snapshot is not None:
        snapshot.check(given)


EXAMPLES: dict[str, tuple[Any, str]] = {
    "number": (3, r"example_inputs.*(int|3)"),
    "text": ("image", r"example_inputs.*(str|image)"),
    "module": (nn.Identity(), r"example_inputs.*Identity"),
    "shape": ((1, 4, 8, 9), r"example_inputs"),
    "too_few_channels": ((torch.zeros(1, 3, 8, 9),), r"(?s)example_inputs"),
    "too_few_dimensions": ((torch.zeros(8, 9),), r"(?s)(?=.*example_inputs)"),
    "too_many": ((torch.zeros(1, 4, 8, 9), torch.zeros(1, 4, 8, 9)), r"(?s)example_inputs"),
    "none": ((), r"(?s)example_inputs"),
    "another_dtype": ((torch.zeros(1, 4, 8, 9, dtype=torch.float16),), r"(?s)(?=.*example_inputs)"),
    "on_meta": ((torch.zeros(1, 4, 8, 9, device="meta"),), r"(?s)(?=.*example_inputs)"),
}


@pytest.mark.parametrize(("example_inputs", "words"), EXAMPLES.values(), ids=EXAMPLES)
@pytest.mark.parametrize("name", ["add_plus", "branch_on_values"])
@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
def test_example_inputs_refused(example_inputs: Any, words: str, name: str, verify: bool) -> None:
    """They are refused where they are needed: to observe a network, or to verify one."""
    network = CASES[name].build()
    if name == "add_plus" and not verify and isinstance(example_inputs, tuple):
        pytest.skip("a network that can be traced needs no run")
    snapshot = Snapshot(network)
    with pytest.raises((fused_cna.FusionError, TypeError, ValueError), match=words):
        fused_cna.fuse(network, example_inputs=example_inputs, verify=verify)
    snapshot.check(network)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,)], ids=["tensor", "tuple"])
def test_example_inputs_of_one_tensor(form: Callable[[Tensor], Any]) -> None:
    """A single tensor stands for itself; a tuple for positional arguments."""
    network = CASES["branch_on_values"].build()
    fused = fused_cna.fuse(network, example_inputs=form(image()))
    with torch.no_grad():
        assert_same(fused(image()), network(image()), 1e-10)


def test_what_no_copy_can_be_made_of_can_be_fused_in_place() -> None:
    """A weight that was computed with gradients on, as pruning leaves it, does not deep-copy."""
    network, plain = group(), group()
    for each in (network, plain):
        prune.l1_unstructured(each.conv, "weight", 0.5)
    snapshot = Snapshot(network)
    with pytest.raises(fused_cna.FusionError, match="inplace=True"):
        fused_cna.fuse(network)
    snapshot.check(network)
    with torch.no_grad():
        assert_same(fused_cna.fuse(network, inplace=True)(image()), plain(image()), 1e-10)


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


def test_verify_needs_example_inputs() -> None:
    network = group()
    snapshot = Snapshot(network)
    with pytest.raises((fused_cna.FusionError, ValueError, TypeError), match="example_inputs"):
        fused_cna.fuse(network, verify=True)
    snapshot.check(network)


def test_what_cannot_be_traced_needs_example_inputs() -> None:
    network = CASES["branch_on_values"].build()
    snapshot = Snapshot(network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fused_cna.fuse(network)
        except fused_cna.FusionError as error:
            caught_words = str(error)
        else:
            caught_words = " ".join(str(warning.message) for warning in caught)
    assert "example_inputs" in caught_words
    snapshot.check(network)


def test_example_inputs_are_left_alone() -> None:
    """Even by a network that overwrites its input."""
    for name in ("input_scaled_in_place", "branch_on_values"):
        x = image()
        before, version = x.clone(), x._version
        fused_cna.fuse(CASES[name].build(), example_inputs=(x,), verify=True)
        assert torch.equal(x, before)
        assert x._version == version


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
    plain = group()
    with torch.no_grad():
        assert_same(fused.eval()(image()), plain(image()), 1e-10)
    assert fused_cna.report(fused).layers[0].fused


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU()), lambda: nn.Linear(4, 3), nn.Identity, nn.Sequential],
    ids=["linear", "root", "identity", "empty"],
)
def test_without_convolutions(make: Callable[[], nn.Module]) -> None:
    network = make().eval()
    snapshot = Snapshot(network)
    fused = fused_cna.fuse(network)
    snapshot.check(network)
    report = fused_cna.report(fused)
    assert not report.layers
    assert "no convolution" in str(report).lower()
    x = torch.randn(2, 4)
    assert_same(fused(x), network(x), 0)


def test_report_of_what_was_not_fused() -> None:
    with pytest.raises((fused_cna.FusionError, TypeError, ValueError), match=r"nn.Module"):
        fused_cna.report(3)


def test_unfuse_of_what_was_not_fused() -> None:
    network = group()
    snapshot = Snapshot(network)
    plain = fused_cna.unfuse(network)
    snapshot.check(network)
    with torch.no_grad():
        assert_same(plain(image()), network(image()), 0)
    with pytest.raises((fused_cna.FusionError, TypeError), match=r"nn\.Module"):
        fused_cna.unfuse(3)


STRICT = [
    "conv_output_twice",
    "shared_conv",
    "norm_in_training_mode",
    "parametrized_halved",
    "conv_standardised",
]


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_strict_names_the_layer(name: str, inplace: bool) -> None:
    network = CASES[name].build()
    snapshot = Snapshot(network)
    with pytest.raises(fused_cna.FusionError, match=r"\bconv\b"):
        fused_cna.fuse(network, strict=True, inplace=inplace)
    snapshot.check(network)


@pytest.mark.parametrize("name", ["add_plus", "conv_alone", "norm_first", "norm_group", "transposed"])
def test_strict_passes_where_all_that_looked_fusible_was(name: str) -> None:
    """A bare convolution, or a norm that no kernel folds, does not look fusible."""
    case = CASES[name]
    fused = fused_cna.fuse(case.build(), strict=True)
    with torch.no_grad():
        assert_same(fused(image()), case.build()(image()), 1e-10)


def test_what_forward_refuses_is_still_refused() -> None:
    network = nn.Sequential(Group(), Bottleneck(4, 6, 2)).eval()
    fused = fused_cna.fuse(network)
    for arguments in (
        (torch.zeros(1, 3, 8, 9),),
        (torch.zeros(9),),
        (3,),
        (),
        (torch.zeros(1, 4, 8, 9),) * 2,
    ):
        with pytest.raises(Exception) as expected:  # noqa: PT011
            network(*arguments)
        with pytest.raises(expected.type):
            fused(*arguments)
