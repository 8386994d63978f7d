"""``torch.compile(model, backend="fused_cna")``: its options, its log, what it hands on, real networks."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
from torch import Tensor, nn

from fused_cna.fusion import compiler
from tests.compiled_networks import (
    BLOCK,
    TOLERANCE,
    Block,
    Graphs,
    captured,
    check,
    image,
    randomised,
)
from tests.reference import relative_error

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_groups_are_fused(inner: str) -> None:
    graphs = Graphs(inner)
    check(randomised(Block()), graphs, image(), fullgraph=True)
    assert graphs.parts == BLOCK


def test_the_rest_goes_to_inductor_unless_told_otherwise() -> None:
    network = randomised(Block())
    compiled = torch.compile(network, backend=compiler.compile_graph, fullgraph=True)
    with torch.no_grad():
        x = image()
        assert relative_error(compiled(x), network(x).double()) <= TOLERANCE


@pytest.mark.parametrize(
    ("mode", "options", "expected"),
    [
        ("max-autotune-no-cudagraphs", None, {"max_autotune": True}),
        (None, {"inner": "inductor", "max_autotune": True}, {"max_autotune": True}),
        (
            None,
            {"max_autotune": False, "shape_padding": True},
            {"max_autotune": False, "shape_padding": True},
        ),
    ],
)
def test_modes_and_options_reach_inductor(
    mode: str | None,
    options: dict[str, Any] | None,
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[dict[str, Any]] = []

    def compile_fx(graph_module: Any, inputs: Any, config_patches: Any = None, **rest: Any) -> Any:
        given.append(config_patches)
        return graph_module

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    compiled = torch.compile(Block().eval(), backend=compiler.compile_graph, mode=mode, options=options)
    with torch.no_grad():
        compiled(image())
    (patches,) = given
    assert expected.items() <= patches.items()
    assert "inner" not in patches


def test_modes_and_options_reach_other_backends() -> None:
    given: list[dict[str, Any]] = []

    @torch._dynamo.register_backend(name="fused_cna_test_inner")
    def inner(graph_module: Any, inputs: Any, **options: Any) -> Any:
        given.append(options)
        return graph_module

    name = {"inner": "fused_cna_test_inner"}
    graph_module = captured(Block().eval(), image())
    compiler.compile_graph(graph_module, [], options={**name, "level": 3})
    compiler.compile_graph(graph_module, [], mode="fast", options=name)
    assert given == [{"options": {"level": 3}}, {"mode": "fast"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "fused_cna"}, "must be the name of another backend, .* but got 'fused_cna'"),
        ({"inner": None}, "but got None"),
        ({"inner": "no_such_backend"}, "no_such_backend"),
        ({"no_such_option": 1}, "no_such_option"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    compiled = torch.compile(Block().eval(), backend=compiler.compile_graph, options=options)
    with pytest.raises(Exception, match=message), torch.no_grad():
        compiled(image())


def test_the_backend_is_found_by_its_name_without_an_import(tmp_path: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (entry,) = re.findall(
        r"^\[project\.entry-points\.(torch_dynamo_backends)\]\n(.+ = )\"(.+)\"$", project, re.M
    )
    installed = tmp_path / "fused_cna-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: fused_cna\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[{}]\n{}{}\n".format(*entry))
    program = (
        "import sys, torch\n"
        "assert 'fused_cna' in torch.compiler.list_backends()\n"
        "assert 'fused_cna' not in sys.modules\n"
        "network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()\n"
        "compiled = torch.compile(network, backend='fused_cna', options={'inner': 'eager'})\n"
        "x = torch.randn(1, 3, 8, 8)\n"
        "with torch.no_grad():\n"
        "    torch.testing.assert_close(compiled(x), network(x))\n"
        "assert 'fused_cna.ops' in sys.modules\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_log_says_what_was_fused(graphs: Graphs, caplog: pytest.LogCaptureFixture) -> None:
    class Network(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[0](x)
            return self[1](y) + y.sum()

    caplog.set_level(logging.DEBUG, compiler.__name__)
    torch.compile(Network(Block(), nn.Conv2d(6, 6, 1)).eval(), backend=graphs)(image().requires_grad_())
    with torch.no_grad():
        torch.compile(Network(Block(), nn.Conv2d(6, 6, 1)).eval(), backend=graphs)(image())
    assert [record.message for record in caplog.records if record.levelno == logging.INFO] == [
        "0 of 3 convolutions are fused",
        "2 of 3 convolutions are fused, 1 x conv + norm + relu, 1 x conv + norm + add + relu",
    ]
    reasons = [
        record.message.split(": ", 1)[1]
        for record in caplog.records
        if record.name == compiler.__name__ and record.levelno == logging.DEBUG
    ]
    assert reasons[:2] == ["a gradient is wanted"] * 2
    assert (
        reasons[2:] == ["what is added has another shape, dtype or device, so the addition is not fused"] * 2
    )


@pytest.mark.parametrize(
    ("name", "fused"), [("resnet18", 20), ("mobilenet_v3_small", 52), ("densenet121", 59)]
)
def test_networks(name: str, fused: int) -> None:
    models = pytest.importorskip("torchvision").models
    graphs = Graphs()
    check(randomised(models.get_model(name, weights=None)), graphs, image(2, 3, 64, 64), fullgraph=True)
    assert len(graphs.calls) == fused
