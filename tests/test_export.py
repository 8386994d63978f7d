"""What exporters make of a module and of a fused network, checked by running it."""

from __future__ import annotations

import io
from collections.abc import Callable

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fused_cna
from fused_cna import ops
from tests.compiled_networks import randomised

Exported = Callable[..., Tensor]


class Residual(nn.Module):
    """Blocks with a residual in either order, and one without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = fused_cna.ConvNormAct(3, 8, act=nn.SiLU)
        self.second = fused_cna.ConvNormAct(8, 8, act=nn.Hardswish)
        self.third = fused_cna.ConvNormAct(8, 8, act=nn.LeakyReLU, residual_order="act_add")
        self.last = fused_cna.ConvNormAct(8, 4, 1, norm=None, act=nn.Sigmoid)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(self.third(y, self.second(y, y)))


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a module": lambda: fused_cna.ConvNormAct(3, 8),
    "a module in a Sequential": lambda: nn.Sequential(fused_cna.ConvNormAct(3, 8, act=nn.GELU)),
    "a network of modules": Residual,
    "a fused network": lambda: fused_cna.fuse(plain().eval()),
    "a frozen network": lambda: fused_cna.fuse(plain().eval(), freeze=True),
}


def onnx_program(model: nn.Module, x: Tensor, **options: object) -> Exported:
    file = io.BytesIO()
    exported = torch.onnx.export(model, (x,), None if options["dynamo"] else file, **options)
    if options["dynamo"]:
        exported.save(file)
    onnx.checker.check_model(onnx.load_from_string(file.getvalue()))
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


EXPORTERS: dict[str, Callable[[nn.Module, Tensor], Exported]] = {
    "torch.export": lambda model, x: torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},)
    ).module(),
    "onnx": lambda model, x: onnx_program(
        model, x, dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("n", min=2)},)
    ),
    "onnx by TorchScript": lambda model, x: onnx_program(
        model, x, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}}
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("model", MODELS)
def test_what_is_exported_computes_the_same(model: str, exporter: str) -> None:
    torch.manual_seed(0)
    network = randomised(MODELS[model]()).eval()
    with torch.no_grad():
        exported = EXPORTERS[exporter](network, torch.randn(2, 3, 9, 8))
        for batch in (2, 5):
            x = torch.randn(batch, 3, 9, 8)
            torch.testing.assert_close(exported(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_onnx_has_no_operator_of_ours(exporter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where calls go to the operator, the later ones without Python."""
    monkeypatch.setattr(ops, "operator_everywhere", True)
    network, x = randomised(Residual()).eval(), torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        for _ in range(3):
            expected = network(x)
        exported = EXPORTERS[exporter](network, x)
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)
    assert exporter.startswith("onnx") or "fused_cna.conv_norm_act" in str(exported.graph)


def test_a_residual_may_be_an_input() -> None:
    block = fused_cna.ConvNormAct(4, 4).eval()
    x, residual = torch.randn(2, 1, 4, 6, 6)
    exported = torch.export.export(block, (x, residual)).module()
    torch.testing.assert_close(exported(x, residual), block(x, residual))
