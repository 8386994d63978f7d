"""``torch.compile(model, backend="fused_cna")``: its options, log, captures and devices; real networks."""

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
from torch import fx, nn
from torch._dynamo.backends.cudagraphs import check_for_skip
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fused_cna import _extension, config, ops
from fused_cna.fusion import compiler
from tests.compiled_networks import Block, FunctionalNorm, Graphs, captured, check, image, randomised

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROOT = Path(__file__).resolve().parents[1]


def test_the_rest_goes_to_inductor_unless_told_otherwise(operators: None) -> None:
    check(randomised(Block()), compiler.compile_graph, image(), fullgraph=True)


@pytest.mark.parametrize(
    ("mode", "options"),
    [("max-autotune", None), (None, {"inner": "inductor", "max_autotune": True, "triton.cudagraphs": True})],
)
def test_modes_and_options_reach_inductor(
    mode: str | None, options: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def compile_fx(graph_module: Any, inputs: Any, config_patches: Any = None, **rest: Any) -> Any:
        given.append(config_patches)
        return graph_module

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    check(Block().eval(), compiler.compile_graph, image(), mode=mode, options=options)
    assert given[0]["max_autotune"] is given[0]["triton.cudagraphs"] is True
    assert "inner" not in given[0]


def test_modes_and_options_reach_other_backends() -> None:
    given: list[dict[str, Any]] = []

    @torch._dynamo.register_backend(name="fused_cna_test_inner")
    def inner(graph_module: Any, inputs: Any, **options: Any) -> Any:
        given.append(options)

    graph_module = captured(Block().eval(), image())
    for more in ({"options": {"level": 3}}, {"mode": "fast", "options": {}}):
        options = {"inner": "fused_cna_test_inner", **more.pop("options")}
        compiler.compile_graph(graph_module, [], options=options, **more)
    assert given == [{"options": {"level": 3}}, {"mode": "fast"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "fused_cna"}, "but got 'fused_cna'"),
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
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, check=True)


def test_the_log_says_what_was_fused(
    operators: None, graphs: Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, compiler.__name__)
    network = nn.Sequential(Block(), nn.Conv2d(6, 6, 1)).eval()
    torch.compile(network, backend=graphs)(image().requires_grad_())
    check(network, graphs, image())
    records = [record for record in caplog.records if record.name == compiler.__name__]
    nothing, both = [record.message for record in records if record.levelno == logging.INFO]
    assert (nothing.split()[0], both.split()[0]) == ("0", "2")
    assert "1 x conv + norm + relu" in both
    assert "1 x conv + norm + add + relu" in both
    assert sum(record.levelno == logging.DEBUG for record in records) == 3 + 1


@pytest.mark.parametrize(
    ("name", "fused"), [("resnet18", 20), ("mobilenet_v3_small", 52), ("densenet121", 59)]
)
def test_networks(operators: None, name: str, fused: int, graphs: Graphs) -> None:
    models = pytest.importorskip("torchvision").models
    check(randomised(models.get_model(name, weights=None)), graphs, image(2, 3, 64, 64), fullgraph=True)
    assert len(graphs.calls) == fused


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_second_size_is_captured_once_more_and_a_third_is_not(
    inner: str, everywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although torch computes a batch of one with more than 20480 numbers in another way."""
    monkeypatch.setattr(ops, "operator_everywhere", everywhere)
    graphs = Graphs(inner)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.ReLU(), randomised(Block(16)), nn.Conv2d(16, 32, 3, 2)
    ).eval()
    compiled = torch.compile(network, backend=graphs)
    for size in (32, 48, 64, 96, 128, 80):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = image(1, 3, size, size + 16).to(memory_format=memory_format)
            check(network, graphs, x, compiled=compiled)
    assert len(graphs.made) == 4  # two for each memory format


def test_on_a_cpu_the_graph_stays_as_it_is() -> None:
    graph_module = captured(randomised(Block()), image())
    before = graph_module.code
    compiler.fuse_graph(graph_module)
    assert graph_module.code == before


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose GPU the extension was built for."""
    monkeypatch.setattr(_extension, "is_available", lambda: True)
    monkeypatch.setattr(ops, "device_obstacle", lambda index: "")
    monkeypatch.setattr(ops, "_device_obstacles", {})
    monkeypatch.setattr(ops, "_warned_about", set())


def captured_on_gpu(network: nn.Module, x: torch.Tensor) -> tuple[fx.GraphModule, list[FakeTensor]]:
    """The graph that Dynamo would make there, and its inputs."""
    graph_module = captured(network, x)
    with FakeTensorMode():
        for node in graph_module.graph.nodes:
            if isinstance(value := node.meta.get("example_value"), FakeTensor):
                node.meta["example_value"] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device="cuda"
                )
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    return graph_module, [node.meta["example_value"] for node in placeholders]


def test_on_a_gpu_the_graph_calls_nothing_but_the_operator(pretended_gpu: None) -> None:
    graph_module, inputs = captured_on_gpu(randomised(Block()), image())
    compiler.fuse_graph(graph_module)
    with inputs[0].fake_mode, torch.no_grad():
        (result,) = graph_module(*inputs)
        traced = make_fx(graph_module, tracing_mode="fake")(*inputs)
    assert result.is_cuda
    for graph in (graph_module.graph, traced.graph):
        called = [node.target for node in graph.nodes if node.op.startswith("call")]
        assert called == [torch.ops.fused_cna.conv_norm_act.default] * 2


def test_cuda_graphs_take_the_graph_of_a_gpu(pretended_gpu: None) -> None:
    """By the check of torch's own backend, which leaves out what cannot be captured."""
    graph_module, inputs = captured_on_gpu(randomised(Block()), image())
    compiler.fuse_graph(graph_module)
    with torch.no_grad():
        traced = make_fx(graph_module, tracing_mode="fake")(*inputs)
    assert check_for_skip(traced, 0) is None


def test_cuda_graphs_on_a_cpu_are_left_out(operators: None) -> None:
    network = randomised(Block())
    compiled = check(network, compiler.compile_graph, image(), options={"inner": "cudagraphs"})
    for size in (5, 7):
        check(network, compiler.compile_graph, image(2, 6, size, 8), compiled=compiled)


def test_what_no_kernel_takes_says_so_on_every_call(
    pretended_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = FunctionalNorm(nn.Conv2d(6, 8, 3), torch.float64).eval().double()
    first, inputs = captured_on_gpu(network, image().double())
    second, _ = captured_on_gpu(network, image().double())
    with pytest.warns(config.FusionFallbackWarning):
        compiler.fuse_graph(first)
    monkeypatch.setattr(config, "strict", True)
    with pytest.raises(RuntimeError, match=r"float64.*strict"):
        compiler.fuse_graph(second)
    with inputs[0].fake_mode, torch.no_grad(), pytest.raises(RuntimeError, match=r"float64.*strict"):
        first(*inputs)
