"""The bench's smaller jobs on tiny inputs, and where results say they come from."""

import json
import subprocess
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import cli, host_parts, overhead, provenance, report, terminal
from bench.setting import PRECISIONS
from fused_cna import _extension, ops
from tests.bench_cases import setting

needs_extension = pytest.mark.skipif(not _extension.is_available(), reason="the parts are the extension's")


class TestOverhead:
    def test_measures_three_ways(self) -> None:
        steps: list[str] = []
        result = overhead.run(setting(), steps.append)
        assert steps == ["call overhead", "its parts"]
        assert min(result.fused.median, result.three_modules.median, result.hand_written.median) > 0
        assert result.goal == 1.1
        assert result.reached == (result.ratio.median <= 1.1)
        assert json.loads(json.dumps(result.as_json()))["ratio"]["count"] == 15

    @needs_extension
    def test_splits_a_call(self) -> None:
        before = ops.operator, ops.operator_everywhere
        parts = overhead.run(setting(), lambda step: None).parts
        assert (ops.operator, ops.operator_everywhere) == before
        assert list(parts.seconds) == ["inference_mode", "no_grad"]
        for seconds in parts.seconds.values():
            assert list(seconds) == [name for name in host_parts.MEANINGS if name != "launch"]
            assert min(seconds[name].median for name in (*host_parts.STAGES, "all", "by torch.ops")) > 0
        assert json.loads(json.dumps(parts.as_json()))["seconds"]["no_grad"]["plan"]["count"] == 15

    def test_a_gpu_adds_the_launch(self, capsys: pytest.CaptureFixture[str]) -> None:
        dry = {"module": [4.0, 5.0], "arranged": [3.0, 3.0], "by torch.ops": [6.0, 6.0]}
        seconds = host_parts._split(dry, [[0.25] * 5] * 2, [7.0, 8.0])
        assert {name: seconds[name].median for name in ("module", "dispatch", "launch", "all")} == {
            "module": 1.5,
            "dispatch": 1.75,
            "launch": 3.0,
            "all": 7.5,
        }
        host_parts.print_parts(terminal.PlainConsole(), host_parts.HostParts({"no_grad": seconds}))
        assert "needs a GPU" not in capsys.readouterr().out

    def test_without_the_extension_the_other_numbers_stand(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(_extension, "_module", None)
        monkeypatch.setattr(_extension, "_reason", "it was not built")
        result = overhead.run(setting(), lambda step: None)
        assert result.as_json()["parts"] == {"why_not": result.parts.why_not}
        host_parts.print_parts(terminal.PlainConsole(), result.parts)
        assert "it was not built" in capsys.readouterr().out
        assert result.ratio.median > 0


class TestPipeline:
    def test_photographs_become_different_normalised_crops(self) -> None:
        pytest.importorskip("sklearn", reason="the photographs ship inside scikit-learn")
        from bench.photographs import crops, photographs

        images = photographs()
        assert [tuple(image.shape) for image in images] == [(1, 3, 427, 640)] * 2
        batch = crops(images, 4, 32, seed=3)
        assert batch.shape == (4, 3, 32, 32)
        assert -2.2 < float(batch.min()) < float(batch.max()) < 2.7
        assert len({float(image.sum()) for image in batch}) == 4
        assert torch.equal(batch, crops(images, 4, 32, seed=3))
        assert not torch.equal(batch, crops(images, 4, 32, seed=4))

    def test_calibration_is_the_mean_over_batches(self) -> None:
        pytest.importorskip("torchvision", reason="the pipeline's networks are torchvision's")
        from bench.pipeline import calibrate

        network = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
        batches = [torch.randn(4, 3, 5, 5) + shift for shift in (0.0, 4.0)]
        calibrate(network, batches)
        norm = network[0]
        assert isinstance(norm, nn.BatchNorm2d)
        means = torch.stack([batch.mean((0, 2, 3)) for batch in batches])
        variances = torch.stack([batch.var((0, 2, 3)) for batch in batches])
        torch.testing.assert_close(norm.running_mean, means.mean(0))
        torch.testing.assert_close(norm.running_var, variances.mean(0))
        assert norm.momentum == 0.1
        assert not any(module.training for module in network.modules())

    def test_every_conv_norm_activation_is_replaced(self) -> None:
        torchvision = pytest.importorskip("torchvision", reason="the pipeline's networks are torchvision's")
        from torchvision.ops.misc import Conv2dNormActivation

        from bench.pipeline import replace_layers
        from fused_cna import ConvNormAct

        network = torchvision.models.mobilenet_v2(weights=None).eval()
        before = sum(isinstance(module, Conv2dNormActivation) for module in network.modules())
        assert replace_layers(network) == before > 30
        kinds = [type(module) for module in network.modules()]
        assert kinds.count(ConvNormAct) == before
        assert Conv2dNormActivation not in kinds

    def test_a_network_gives_the_same_answers(self) -> None:
        for module in ("torchvision", "sklearn"):
            pytest.importorskip(module, reason="the pipeline needs it")
        from bench import pipeline
        from bench.photographs import photographs

        result = pipeline.measure("mobilenet_v2", photographs(), setting(), size=32)
        assert result.layers_replaced == 35
        assert result.convolutions == 52
        assert result.failure is None
        assert 0 < result.eager_error < 1e-3
        assert result.top1_agreement == 1.0
        assert result.latency["launched"].before.median > 0
        assert json.loads(json.dumps(result.as_json()))["network"] == "mobilenet_v2"
        said = report.pipeline_summary([result])
        assert said[0].startswith("photographs, mobilenet_v2 n2: 35 of 52 convolutions replaced")
        assert [line.partition(":")[0] for line in said[1:]] == ["  launched eagerly"]

    def test_a_wrong_network_is_a_failure(self) -> None:
        pytest.importorskip("torchvision", reason="the pipeline's networks are torchvision's")
        from bench.pipeline import failure_of

        assert failure_of(1e-5, 9e-6, PRECISIONS["fp32"]) is None
        assert "at most 1.89e-05 is allowed" in str(failure_of(1e-4, 9e-6, PRECISIONS["fp32"]))


class TestProvenance:
    def test_says_everything(self) -> None:
        said = json.loads(json.dumps(provenance.provenance(setting(), ["layers", "--batch", "2"], 0.25)))
        assert said["command"] == ["python", "-m", "bench", "layers", "--batch", "2"]
        assert said["torch"] == torch.__version__
        assert said["fused_cna"]["version"]
        assert said["host"]["threads"] == torch.get_num_threads()
        assert said["device"] == {"type": "cpu", "name": provenance.cpu_model()}
        assert datetime.fromisoformat(said["date"]).tzinfo is not None
        assert said["seed"] == 0
        assert said["host"]["load_before"] == 0.25

    def test_a_gpu_is_described(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = SimpleNamespace(
            major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU 80GB")
        monkeypatch.setattr(provenance, "_output", lambda *command: "580.1\n580.1\n")
        gpu = torch.device("cuda", 0)
        described = provenance.device_description(gpu)
        assert (described["name"], described["capability"], described["driver"]) == (
            "A GPU 80GB",
            [9, 0],
            "580.1",
        )
        assert set(described) >= {"cuda", "cudnn", "l2_bytes", "multiprocessors", "memory_bytes"}
        assert cli.default_folder(gpu, datetime(2026, 1, 2, 3, 4, 5)) == "a-gpu-80gb-20260102-030405"

    def test_commit_and_dirt(self, tmp_path: Path) -> None:
        def git(*arguments: str) -> None:
            identity = ("-c", "user.name=a", "-c", "user.email=a@b")
            subprocess.run(
                ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True
            )

        git("init")
        assert provenance.git_state(tmp_path) is None
        (tmp_path / "file").write_text("a")
        git("add", "file")
        git("commit", "-m", "first")
        state = provenance.git_state(tmp_path)
        assert state is not None
        assert (len(state["commit"]), state["dirty"]) == (40, False)
        (tmp_path / "file").write_text("b")
        changed = provenance.git_state(tmp_path)
        assert changed == {"commit": state["commit"], "dirty": True}
