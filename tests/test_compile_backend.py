"""``torch.compile(model, backend="fused_cna")``: what it fuses, and that nothing else changes."""

from __future__ import annotations

import copy
import logging
import operator
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fused_cna
from fused_cna import _extension, ops
from fused_cna.fusion import compiler
from tests.reference import relative_error

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 2e-6


class Graphs:
    """The backend, eager inside, that remembers the graphs it was given, each with its fused calls."""

    def __init__(self, inner: str = "eager", **options: Any) -> None:
        self.options = {"inner": inner, **options}
        self.made: list[fx.GraphModule] = []

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.made.append(graph_module)
        return compiler.compile_graph(graph_module, inputs, options=self.options)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The options of all fused calls, in order."""
        return [
            dict(node.kwargs)
            for graph_module in self.made
            for node in graph_module.graph.nodes
            if node.target is fused_cna.conv_norm_act
        ]

    @property
    def parts(self) -> list[str]:
        """What each fused call computes besides the convolution."""
        return [
            " + ".join(
                [
                    *(["norm"] if "running_mean" in call else []),
                    *([call["residual_order"]] if "residual" in call else []),
                    *([call["act"]] if call.get("act", "identity") != "identity" else []),
                ]
            )
            for call in self.calls
        ]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs() -> Graphs:
    return Graphs()


def randomised(network: nn.Module) -> nn.Module:
    """The network in eval mode, with batch norms that do something."""
    for module in network.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.uniform_(-0.3, 0.3)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return network.eval()


class Block(nn.Module):
    """Two convolutions, the second with a residual, which only some uses add."""

    def __init__(self, channels: int = 6, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        return self.act(y)


BLOCK = ["norm + relu", "norm + add_act + relu"]


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 6, 9, 10))


def check(
    network: Callable[..., Any], graphs: Graphs, *inputs: Tensor, tolerance: float = TOLERANCE, **options: Any
) -> Callable[..., Any]:
    """Compile, run, compare; the compiled network."""
    compiled = torch.compile(network, backend=graphs, **options)
    with torch.no_grad():
        expected = network(*[x.clone() for x in inputs])
        actual = compiled(*[x.clone() for x in inputs])
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    assert relative_error(actual, expected.double()) <= tolerance
    return compiled


def captured(network: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The graph that Dynamo makes of a network."""
    graphs: list[fx.GraphModule] = []

    def backend(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(copy.deepcopy(graph_module))
        for mine, theirs in zip(graphs[0].graph.nodes, graph_module.graph.nodes, strict=True):
            mine.meta = dict(theirs.meta)
        return graph_module

    with torch.no_grad():
        torch.compile(network, backend=backend, fullgraph=True)(*inputs)
    (graph_module,) = graphs
    return graph_module


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


ACTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "relu": (nn.ReLU(), "relu"),
    "relu_inplace": (nn.ReLU(inplace=True), "relu"),
    "relu_function": (torch.relu, "relu"),
    "relu_method": (lambda x: x.relu_(), "relu"),
    "relu_clamp": (lambda x: x.clamp(min=0), "relu"),
    "relu6": (nn.ReLU6(), "relu6"),
    "hardtanh": (nn.Hardtanh(0, 6, inplace=True), "relu6"),
    "leaky_relu": (nn.LeakyReLU(0.2, inplace=True), "leaky_relu"),
    "elu": (nn.ELU(0.5), "elu"),
    "silu": (nn.SiLU(inplace=True), "silu"),
    "gelu": (nn.GELU(), "gelu"),
    "gelu_tanh": (nn.GELU(approximate="tanh"), "gelu_tanh"),
    "hardswish": (nn.Hardswish(inplace=True), "hardswish"),
    "hardsigmoid": (nn.Hardsigmoid(), "hardsigmoid"),
    "sigmoid": (torch.sigmoid, "sigmoid"),
    "tanh": (nn.Tanh(), "tanh"),
    "mish": (nn.Mish(), "mish"),
}


@pytest.mark.parametrize(("act", "name"), ACTS.values(), ids=ACTS)
def test_activations(act: Callable[[Tensor], Tensor], name: str, graphs: Graphs) -> None:
    check(randomised(Block(act=act)), graphs, image(), fullgraph=True)
    assert graphs.parts == [f"norm + {name}", f"norm + add_act + {name}"]


class FunctionalNorm(nn.Module):
    """``F.batch_norm`` of whatever it is given."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("mean", torch.rand(conv.out_channels, dtype=dtype))
        self.register_buffer("var", torch.rand(conv.out_channels, dtype=dtype) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var)


@pytest.mark.parametrize("padding", ["same", "valid", 2, (0, 1)])
def test_paddings(padding: Any, graphs: Graphs) -> None:
    check(FunctionalNorm(nn.Conv2d(6, 8, 4, padding=padding, dilation=2, groups=2)).eval(), graphs, image())
    assert graphs.parts == ["norm"]


class PadBefore(FunctionalNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 2, 3)))


def test_zeros_around_the_input(graphs: Graphs) -> None:
    check(PadBefore(nn.Conv2d(6, 8, 3, padding=(1, 2))).eval(), graphs, image(), fullgraph=True)
    (call,) = graphs.calls
    assert call["padding"] == (3, 4, 2, 3)
    (graph_module,) = graphs.made
    assert not any(node.target is torch._C._nn.pad for node in graph_module.graph.nodes)


class Crop(FunctionalNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (-1, 1, 0, 0)))


@pytest.mark.parametrize(
    "network", [Crop(nn.Conv2d(6, 8, 3, padding=1)), PadBefore(nn.Conv2d(6, 8, 3, padding="same"))]
)
def test_pads_that_stay_outside(network: nn.Module, graphs: Graphs) -> None:
    check(network.eval(), graphs, image(), fullgraph=True)
    (call,) = graphs.calls
    assert call["padding"] in ((1, 1), "same")


def test_a_residual_after_the_activation(graphs: Graphs) -> None:
    class Network(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + F.silu(self.norm1(self.conv1(x)))

    check(randomised(Network()), graphs, image(), fullgraph=True)
    assert graphs.parts == ["norm + act_add + silu"]


class BroadcastResidual(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm1(self.conv1(x)) + x.mean((2, 3), keepdim=True))


class PromotedResidual(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm1(self.conv1(x)) + x.double())


class InputOverwritten(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.conv1(x)
        x.mul_(3)
        return F.relu(self.norm1(y) + x)


@pytest.mark.parametrize("kind", [BroadcastResidual, PromotedResidual, InputOverwritten])
def test_residuals_that_stay_outside(kind: type[nn.Module], graphs: Graphs) -> None:
    check(randomised(kind()), graphs, image(), fullgraph=True)
    assert graphs.parts == ["norm"]


def test_views_of_one_tensor_as_inputs(graphs: Graphs) -> None:
    class Network(Block):
        def forward(self, x: Tensor, y: Tensor, residual: Tensor) -> Tensor:
            z = self.norm1(self.conv1(x))
            y.mul_(2)
            return F.relu(z + residual)

    network = randomised(Network())
    x, residual = image(), image()
    with torch.no_grad():
        expected = network(x.clone(), image(), residual)
        actual = torch.compile(network, backend=graphs)(x, x.view(-1), residual)
    assert relative_error(actual, expected.double()) <= TOLERANCE


def test_inputs_and_buffers_are_overwritten_as_before(graphs: Graphs) -> None:
    class Network(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = super().forward(x)
            x.add_(1)
            return y + self.calls

    network = randomised(Network())
    compiled = torch.compile(copy.deepcopy(network), backend=graphs)
    with torch.no_grad():
        for _ in range(3):
            x = image()
            expected_x, actual_x = x.clone(), x.clone()
            expected, actual = network(expected_x), compiled(actual_x)
            assert relative_error(actual, expected.double()) <= TOLERANCE
            assert torch.equal(actual_x, expected_x)
    assert graphs.parts == BLOCK


def test_parameters_are_read_when_it_runs(graphs: Graphs) -> None:
    network = randomised(Block())
    compiled = check(network, graphs, image())
    x = image()
    with torch.no_grad():
        network.norm1.running_mean.add_(1)
        network.conv2.weight.data.mul_(2)
        network.load_state_dict({key: value + 0.1 for key, value in network.state_dict().items()})
        assert relative_error(compiled(x), network(x).double()) <= TOLERANCE
    assert len(graphs.made) == 1


def test_training_mode_is_left_alone() -> None:
    graphs = Graphs("aot_eager")
    network = randomised(Block()).train()
    other = copy.deepcopy(network)
    compiled = torch.compile(network, backend=graphs, fullgraph=True)
    x = image()
    for run in (compiled, other):
        run(x).square().sum().backward()
    assert graphs.parts == []
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for mine, theirs in zip(network.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_in_eval_mode() -> None:
    graphs = Graphs("aot_eager")
    network = randomised(Block())
    other = copy.deepcopy(network)
    compiled = torch.compile(network, backend=graphs, fullgraph=True)
    x = image().requires_grad_()
    y = x.detach().clone().requires_grad_()
    compiled(x).square().sum().backward()
    other(y).square().sum().backward()
    assert graphs.parts == []
    torch.testing.assert_close(x.grad, y.grad)
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_frozen_part_of_a_network_that_is_trained() -> None:
    graphs = Graphs("aot_eager")
    network = nn.Sequential(randomised(Block()), nn.Conv2d(6, 4, 1), nn.ReLU())
    network[0].requires_grad_(False)
    other = copy.deepcopy(network)
    x = image()
    torch.compile(network, backend=graphs)(x).sum().backward()
    other(x).sum().backward()
    assert graphs.parts == BLOCK
    torch.testing.assert_close(network[1].weight.grad, other[1].weight.grad)


def test_a_change_of_mode_within_a_group(graphs: Graphs) -> None:
    class Network(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(x)
            with torch.enable_grad():
                y = self.norm1(y)
            with torch.autocast("cpu", torch.bfloat16):
                z = self.conv2(y)
            return F.relu(self.norm2(z.float()) + x), self.norm2(z)

    network = randomised(Network())
    with torch.no_grad():
        x = image()
        expected, actual = network(x), torch.compile(network, backend=graphs)(x)
    assert graphs.parts == []
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.requires_grad == theirs.requires_grad
        assert relative_error(mine, theirs.double()) <= TOLERANCE


def test_autocast_within(graphs: Graphs) -> None:
    class Network(Block):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = F.relu(self.norm1(self.conv1(x)))
            return F.relu(self.norm2(self.conv2(y.float())))

    check(randomised(Network()), graphs, image(), fullgraph=True)
    assert graphs.parts == ["norm + relu"] * 2


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_autocast_around(inner: str) -> None:
    graphs = Graphs(inner)
    with torch.autocast("cpu", torch.bfloat16):
        # The residual is float32 and what it is added to bfloat16: the sum is float32.
        check(randomised(Block()), graphs, image(), fullgraph=True)
    assert graphs.parts == ["norm + relu", "norm"]


def test_norm_vectors_that_the_operator_refuses(graphs: Graphs) -> None:
    network = FunctionalNorm(nn.Conv2d(6, 8, 3), torch.float64).eval()
    graph_module = captured(network.double(), image().double())
    for node in graph_module.graph.nodes:
        if "buffers_var" in node.name:
            node.meta["example_value"] = node.meta["example_value"].float()
    (group,) = compiler.fuse_graph(graph_module).groups
    assert group.reason == "the parameters of its norm are of several dtypes"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_dtypes(dtype: torch.dtype, graphs: Graphs) -> None:
    network = nn.Sequential(nn.Conv2d(6, 8, 3, dtype=dtype), nn.Sigmoid()).eval()
    x = torch.randn(2, 6, 9, 9, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(network, backend=graphs)(x), network(x))
    assert graphs.parts == ([] if dtype.is_complex else ["sigmoid"])


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_memory_formats(inner: str) -> None:
    network = randomised(Block())
    x = image().to(memory_format=torch.channels_last)
    check(network, Graphs(inner), x)
    torch._dynamo.reset()
    check(network.to(memory_format=torch.channels_last), Graphs(inner), image())


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_symbolic_sizes(inner: str) -> None:
    graphs = Graphs(inner)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), randomised(Block())).eval()
    compiled = torch.compile(network, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for shape in ((2, 3, 20, 24), (3, 3, 20, 24), (5, 3, 31, 17), (4, 3, 22, 40)):
            x = torch.randn(shape)
            for dimension in (0, 2, 3):
                torch._dynamo.mark_dynamic(x, dimension)
            assert relative_error(compiled(x), network(x).double()) <= TOLERANCE
    assert len(graphs.made) == 1
    assert graphs.parts == ["relu", *BLOCK]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_dynamic_by_option(inner: str) -> None:
    graphs = Graphs(inner)
    network = randomised(Block(act=nn.LeakyReLU(0.2)))
    compiled = check(network, graphs, image(), fullgraph=True, dynamic=True)
    # Dynamo may start over once it knows which numbers the backend needs.
    del graphs.made[:-1]
    with torch.no_grad():
        for shape in ((3, 6, 12, 7), (2, 6, 5, 5)):
            x = torch.randn(shape)
            assert relative_error(compiled(x), network(x).double()) <= TOLERANCE
        assert len(graphs.made) == 1
        assert graphs.parts == ["norm + leaky_relu", "norm + add_act + leaky_relu"]
        network.norm1.eps, network.act.negative_slope = 0.25, 0.5
        assert relative_error(compiled(x), network(x).double()) <= TOLERANCE
    assert len(graphs.made) == 2


def test_a_residual_whose_size_only_the_call_shows(graphs: Graphs) -> None:
    class Network(Block):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return F.relu(self.norm1(self.conv1(x)) + residual)

    network = randomised(Network())
    compiled = torch.compile(network, backend=graphs, dynamic=True)
    with torch.no_grad():
        for size in ((2, 6, 9, 10), (2, 6, 9, 10), (2, 1, 1, 10)):
            x, residual = image(), torch.randn(size)
            assert relative_error(compiled(x, residual), network(x, residual).double()) <= TOLERANCE


def test_graph_breaks_and_several_graphs(graphs: Graphs) -> None:
    class Network(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.norm1(self.conv1(x)))
            torch._dynamo.graph_break()
            if y.sum() > 0:
                y = -y
            return F.relu(self.norm2(self.conv2(y)))

    check(randomised(Network()), graphs, image())
    assert graphs.parts == ["norm + relu"] * 2
    assert len(graphs.made) >= 2


def test_checkpointed_and_conditional_parts_are_left_alone() -> None:
    class Network(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)
            return F.relu(self.norm1(self.conv1(y)))

    graphs = Graphs("aot_eager")
    check(randomised(Network()), graphs, image())
    assert graphs.parts == ["norm + relu"]


def test_functional_transforms_are_left_alone() -> None:
    network = randomised(Block())

    def total(x: Tensor) -> Tensor:
        return network(x).square().sum()

    graphs = Graphs("aot_eager")
    x = image()
    actual = torch.compile(torch.func.grad(total), backend=graphs)(x)
    torch.testing.assert_close(actual, torch.func.grad(total)(x))
    assert graphs.parts == []


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_inference_mode(inner: str) -> None:
    graphs = Graphs(inner)
    network = randomised(Block())
    compiled = torch.compile(network, backend=graphs, fullgraph=True)
    with torch.inference_mode():
        x = image()
        actual = compiled(x)
        assert actual.is_inference()
        assert relative_error(actual, network(x).double()) <= TOLERANCE
    assert graphs.parts == BLOCK


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose GPU the extension was built for."""
    monkeypatch.setattr(_extension, "is_available", lambda: True)
    monkeypatch.setattr(ops, "device_obstacle", lambda index: "")
    monkeypatch.setattr(ops, "_device_obstacles", {})


@pytest.mark.usefixtures("pretended_gpu")
def test_on_a_gpu_the_graph_calls_the_operator() -> None:
    graph_module = captured(randomised(Block()), image())
    compiler.fuse_graph(graph_module)
    sizes = [node.meta["example_value"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    with FakeTensorMode(), torch.no_grad():
        inputs = [torch.empty(size.shape, device="cuda") for size in sizes]
        (result,) = graph_module(*inputs)
        traced = make_fx(graph_module, tracing_mode="fake")(*inputs)
    assert result.is_cuda
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_function")
    assert calls == {torch.ops.fused_cna.conv_norm_act.default: 2}


class WrittenOut(nn.Module):
    """A frozen batch norm as torchvision and timm write it, and variants that are none."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3)
        self.eps = 1e-3
        for name, value in (("weight", 0.5), ("bias", -0.5), ("mean", -0.3), ("var", 0.5)):
            self.register_buffer(name, torch.rand(8, dtype=dtype) + value)

    def vectors(self) -> list[Tensor]:
        return [one.reshape(1, -1, 1, 1) for one in (self.weight, self.bias, self.mean, self.var)]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = self.vectors()
        scale = weight * (var + self.eps).rsqrt()
        return F.relu(self.conv(x) * scale + (bias - mean * scale))


class OtherScale(WrittenOut):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = self.vectors()
        scale, other = weight * (var + self.eps).rsqrt(), bias * (var + self.eps).rsqrt()
        return F.relu(self.conv(x) * scale + (bias - mean * other))


class VectorOverwritten(WrittenOut):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = self.vectors()
        scale = weight * (var + self.eps).rsqrt()
        self.weight.mul_(1)
        return F.relu(self.conv(x) * scale + (bias - mean * scale))


class UsedTwice(WrittenOut):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = self.vectors()
        scale = weight * (var + self.eps).rsqrt()
        y = self.conv(x)
        return F.relu(y * scale + (bias - mean * scale)) + y


@pytest.mark.parametrize("options", [{}, {"dynamic": True}])
def test_a_norm_that_is_written_out(options: dict[str, Any], graphs: Graphs) -> None:
    check(WrittenOut().eval(), graphs, image(), **options)
    assert graphs.parts == ["norm + relu"]
    (graph_module,) = graphs.made
    assert not any(node.target in ("reshape", "rsqrt", operator.mul) for node in graph_module.graph.nodes)


@pytest.mark.parametrize(
    "network", [OtherScale(), VectorOverwritten(), UsedTwice(), WrittenOut(torch.float64)], ids=repr
)
def test_what_looks_like_a_norm_that_is_written_out(network: nn.Module, graphs: Graphs) -> None:
    check(network.eval(), graphs, image())
    assert graphs.parts == []


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_frozen_norms(name: str, graphs: Graphs) -> None:
    library = pytest.importorskip(name)
    norm = library.ops.FrozenBatchNorm2d if name == "torchvision" else library.layers.FrozenBatchNormAct2d
    network = nn.Sequential(nn.Conv2d(6, 8, 3), norm(8), nn.ReLU()).eval()
    network[1].running_var.uniform_(0.5, 2)
    network[1].running_mean.uniform_(-0.3, 0.3)
    check(network, graphs, image(), fullgraph=True)
    assert graphs.parts == ["norm + relu"]


@pytest.mark.parametrize(
    ("name", "fused"), [("resnet18", 20), ("mobilenet_v3_small", 52), ("densenet121", 59)]
)
def test_networks(name: str, fused: int) -> None:
    models = pytest.importorskip("torchvision").models
    graphs = Graphs()
    check(randomised(models.get_model(name, weights=None)), graphs, image(2, 3, 64, 64), fullgraph=True)
    assert len(graphs.calls) == fused
