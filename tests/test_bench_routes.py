"""The routes of the bench: each computes the layer, or says why it does not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cudnn_graph, jobs, measure, routes
from bench.cases import PRECISIONS
from bench.report import make_console
from bench.routes import BASELINE, FUSED, LAYER_ROUTES, make_case, reference
from fused_cna import _extension
from fused_cna._accuracy import relative_error
from tests.bench_cases import CPU, FakeClock, fake_cudnn, layer
from tests.fake_cuda import environment
from tests.reference import library_bound

ROOT = Path(__file__).resolve().parents[1]
BY_NAME = {route.name: route for route in LAYER_ROUTES}

VARIANTS = {
    "norm": {},
    "bias and norm": {"conv_bias": True},
    "no norm": {"norm": "none", "conv_bias": True, "act": "SiLU"},
    "bare": {"norm": "none", "act": "none"},
    "add_act": {"residual": "add_act"},
    "act_add": {"residual": "act_add", "act": "SiLU"},
    "depthwise": {"groups": 8, "cout": 8, "act": "ReLU6"},
    "grouped": {"groups": 2, "act": "LeakyReLU"},
    "strided": {"stride_h": 2, "stride_w": 2, "dil_w": 2, "act": "Hardswish"},
    **{act: {"act": act} for act in ("GELU", "ELU", "Hardsigmoid", "Sigmoid", "Tanh", "Mish")},
}


class TestRoutes:
    @pytest.fixture
    def pretended(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A cuDNN and, for what it asks of torch.cuda, a clock."""
        clock = FakeClock()

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = clock.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, device=None, **options: empty(*size, **options))
        made = fake_cudnn(clock)
        monkeypatch.setattr(cudnn_graph, "opened", lambda: (made, "handle"))
        return made

    @pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
    @pytest.mark.parametrize("name", [FUSED, BASELINE, "folded conv", routes.GRAPH])
    def test_every_route_computes_the_layer(self, name: str, changes: dict[str, Any], pretended: Any) -> None:
        case = make_case(layer(**changes), CPU, PRECISIONS["fp32"], seed=1)
        layouts = BY_NAME[name].formats
        for layout in layouts:
            sets = measure.input_sets(case.layer.shapes(2), 2, layout, case.conv.weight)
            kept = [tensor.clone() for tensor in sets[1]]
            with torch.inference_mode():
                expected = reference(case, *sets[1])
                both = [(case.laid_out(layout), inputs) for inputs in sets]
                output = BY_NAME[name].prepare(both)[1]()
                eager = BY_NAME[BASELINE].prepare(both)[1]()
            assert relative_error(output, expected) <= library_bound(
                torch.float32, relative_error(eager, expected)
            )
            assert all(torch.equal(tensor, before) for tensor, before in zip(sets[1], kept, strict=True))

    def test_cudnn_runs_the_fastest_engine_of_both_graphs_in_the_precision_asked_for(
        self, pretended: Any
    ) -> None:
        case = make_case(layer(residual="add_act"), CPU, PRECISIONS["fp32"], seed=1)
        ((inputs),) = measure.input_sets(case.layer.shapes(2), 1, torch.channels_last, case.conv.weight)
        (call,) = BY_NAME[routes.GRAPH].prepare([(case.laid_out(torch.channels_last), inputs)])
        call()
        folded, scaled = pretended.graphs
        assert folded.operations == ["conv", "add", "add", "relu"]
        assert scaled.operations == ["conv", "mul", "add", "add", "relu"]
        assert folded.notes == ["down", "tensor core"]
        assert call.args[0].keys() >= {"x", "weight", "bias", "residual"}

    def test_cudnn_says_itself_why_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        refuses = fake_cudnn(FakeClock(), "NOT_SUPPORTED: no engine")
        monkeypatch.setattr(cudnn_graph, "opened", lambda: (refuses, "handle"))
        case = make_case(layer(), CPU, PRECISIONS["fp32"], seed=1)
        x = torch.randn(1, 8, 6, 5).to(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match="NOT_SUPPORTED: no engine"):
            BY_NAME[routes.GRAPH].prepare([(case, (x,))])
        monkeypatch.setattr(cudnn_graph.importlib.util, "find_spec", lambda name: None)
        assert "pip install nvidia-cudnn-frontend" in str(BY_NAME[routes.GRAPH].why_not(layer()))

    def test_the_real_package_takes_the_description(self) -> None:
        cudnn = pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is optional")
        for changes in VARIANTS.values():
            made = cudnn_graph.describe_graph(cudnn, layer(**changes), 2, PRECISIONS["fp16"], scaled=True)
            assert {"x", "weight", "scale", "bias", "y"} <= set(made.tensors)
            assert len(set(made.tensors.values())) == len(made.tensors), "they are the keys of a pack"
            assert len(made.graph.nodes) >= 3

    def test_one_compiled_layer_takes_every_weight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compiled = list[str]()

        def compile_layer(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
            compiled.append(options["mode"])
            return function

        monkeypatch.setattr(torch, "compile", compile_layer)
        made = [make_case(layer(), CPU, PRECISIONS["fp32"], seed) for seed in (1, 2)]
        x = torch.randn(2, 8, 6, 5)
        with torch.inference_mode():
            outputs = [call() for call in BY_NAME[routes.AUTOTUNED].prepare([(case, (x,)) for case in made])]
            expected = [reference(case, x) for case in made]
        assert compiled == ["max-autotune-no-cudagraphs"]
        assert max(relative_error(one, other) for one, other in zip(outputs, expected, strict=True)) < 1e-6

    def test_routes_say_why_they_do_not_apply(self) -> None:
        assert "SiLU" in str(BY_NAME["cuDNN relu"].why_not(layer(act="SiLU")))
        assert BY_NAME["cuDNN relu"].why_not(layer(residual="act_add"))
        assert BY_NAME["cuDNN relu"].why_not(layer()) is None
        assert BY_NAME["folded conv"].why_not(layer(norm="none"))

    def test_a_gpu_tries_nchw_where_it_may_be_faster(self) -> None:
        dense = {"cin": 64, "cout": 64}
        for changes, precision, formats in (
            (dense, "fp16", 1),
            (dense, "fp32", 2),
            (dense | {"groups": 64}, "fp16", 2),
            (dense | {"cin": 3}, "fp16", 2),
        ):
            tried = jobs.formats_of(layer(**changes), PRECISIONS[precision], True)
            assert tried == routes.FORMATS[:formats]


@pytest.mark.skipif(not _extension.is_available(), reason="what is pretended needs the extension")
def test_on_a_pretended_gpu_every_route_is_launched_and_captured(tmp_path: Path) -> None:
    program = """
import functools, sys
from bench import __main__, cases, jobs
from tests import fake_cuda
layers_of = cases.layers_of
cases.layers_of = lambda suite: layers_of(suite)[1:3]
jobs.measure_ceilings = functools.partial(jobs.measure_ceilings, small=True)
fake_cuda.install()
sys.exit(__main__.main())
"""
    arguments = ["layers", "--suite", "quick", "--batch", "1", "--no-compile", "--budget", "60"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--device", "cuda", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode in (0, 1), done.stderr
    found = json.loads((tmp_path / "layers.json").read_text())
    assert found["kernels"]
    assert len(found["layers"]["rows"]) == 2
    row = found["layers"]["rows"][0]
    by_name = {one["route"]: one for one in row["routes"]}
    assert set(by_name) == set(BY_NAME)
    assert set(by_name["folded conv"]["seconds"]) == {"launched", "graph"}
    assert by_name["max-autotune"]["refused"] == "left out by --no-compile"
    assert make_console() is not None
    assert found["layers"]["groups"]
