"""The job models: which networks and routes there are, and what counts as wrong."""

import importlib.util
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import model_cases, models
from bench.entry import judge
from bench.model_cases import GOALS, MODELS, Case, Model, images_here, planned_cases
from bench.model_routes import (
    EAGER,
    FROZEN,
    FUSED,
    INDUCTOR_FROZEN,
    Call,
    Compiled,
    CompiledFused,
    EagerChannelsLast,
    EagerFolded,
    Fused,
    FusedFrozen,
    ModelRoute,
    routes_for,
)
from bench.setting import PRECISIONS
from tests.bench_cases import setting
from tests.bench_model_cases import (
    NOISE,
    TINY,
    DropsNorms,
    Tiny,
    use_few_routes,
    use_small_networks,
)

GPU = torch.device("cuda", 0)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_networks(monkeypatch)


@pytest.fixture
def few_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    use_few_routes(monkeypatch)


class Refuses(ModelRoute):
    name = "refuses"

    def prepare(self, network: nn.Module, model: Model, x: Tensor) -> Call:
        warnings.warn("careful\nwith this", stacklevel=1)
        raise AttributeError("no such thing\nand more")


class TestCases:
    def test_a_cpu_begins_with_the_goals(self) -> None:
        planned = [(one.network, one.batch) for one in planned_cases(setting(batches=()))]
        assert planned[:3] == [(goal.network, goal.batch) for goal in GOALS]
        assert planned[3 : len(MODELS)] == [(name, 1) for name in list(MODELS)[3:]]
        assert planned[len(MODELS) :] == [("resnet50", 8), ("mobilenet_v2", 1), ("efficientnet_b0", 1)]

    def test_a_gpu_takes_every_network_at_both_batches(self) -> None:
        planned = [(one.network, one.batch) for one in planned_cases(setting(batches=(), device=GPU))]
        assert planned == [(name, batch) for batch in (32, 1) for name in MODELS]

    def test_what_is_asked_for(self) -> None:
        asked = setting(batches=(4, 2), networks=("densenet121", "resnet50"))
        assert [one.name for one in planned_cases(asked)] == [
            "densenet121 n4 fp32",
            "resnet50 n4 fp32",
            "densenet121 n2 fp32",
            "resnet50 n2 fp32",
        ]

    def test_norms_are_calibrated_and_all_their_vectors_matter(self, tiny: None) -> None:
        network = model_cases.build(TINY, NOISE, setting())
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) == 2
        for norm in norms:
            for vector, untouched in (
                (norm.weight, 1),
                (norm.bias, 0),
                (norm.running_mean, 0),
                (norm.running_var, 1),
            ):
                assert vector is not None
                assert bool((vector - untouched).abs().max() > 0.01)
        assert not network.training
        again = model_cases.build(TINY, NOISE, setting())
        assert all(
            torch.equal(one, other)
            for one, other in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
        )

    @pytest.mark.parametrize(("batch", "sets"), [(1, 4), (2, 2), (3, 2), (8, 2)])
    def test_at_least_four_different_images(self, batch: int, sets: int, tiny: None) -> None:
        made = model_cases.input_sets_of(replace(TINY, batch=batch), NOISE, setting())
        assert [tuple(x.shape) for (x,) in made] == [(batch, 3, 16, 16)] * sets
        assert len({float(image.sum()) for (x,) in made for image in x}) == batch * sets

    def test_noise_where_there_are_no_photographs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        images = images_here(seed=0)
        assert "pip install scikit-learn" in images.source
        assert [tuple(picture.shape) for picture in images.pictures] == [(1, 3, 427, 640)] * 2
        assert min(float(p.min()) for p in images.pictures) >= 0
        assert max(float(p.max()) for p in images.pictures) <= 1
        assert not torch.equal(*images.pictures)


class TestNetworks:
    @pytest.mark.parametrize("name", MODELS)
    def test_every_network_fuses_and_is_right(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = MODELS[name]
        pytest.importorskip(model.library, reason=f"{name} is a network of {model.library}")
        monkeypatch.setitem(MODELS, name, replace(model, size_on_cpu=64))
        monkeypatch.setattr(model_cases, "CALIBRATION_BATCHES", 1)
        monkeypatch.setattr(models, "time_entries", lambda *_, **__: None)
        made = models.measure(
            Case(name, 2, "fp32"), (EagerChannelsLast(), Fused(), FusedFrozen()), NOISE, setting()
        )
        assert made.failure is None
        for one in made.entries:
            assert one.error is not None
            assert 0 < one.error < 1e-3
            assert one.agreement is not None
            assert one.agreement > 0.99
        fused = made.entry(FUSED)
        assert fused is not None
        assert fused.conv_calls is not None
        assert fused.fused_calls is not None
        assert 0 < fused.fused_calls <= fused.conv_calls


class TestRoutes:
    def test_of_a_cpu(self) -> None:
        names = [route.name for route in routes_for(setting(max_autotune=True))]
        assert names == [*EAGER, FUSED, FROZEN, INDUCTOR_FROZEN, "compile fused_cna"]

    def test_of_a_gpu(self) -> None:
        names = [route.name for route in routes_for(setting(device=GPU))]
        assert names == [*EAGER, "eager folded", FUSED, INDUCTOR_FROZEN, "torch.compile", "compile fused_cna"]
        tuned = [route.name for route in routes_for(setting(device=GPU, max_autotune=True))]
        assert tuned == [*names, "max-autotune"]

    def test_norms_are_folded_ahead(self) -> None:
        class Norm(nn.BatchNorm2d):
            """As timm's, which activate too."""

            def __init__(self, channels: int) -> None:
                super().__init__(channels)
                self.act = nn.LeakyReLU()

            def forward(self, x: Tensor) -> Tensor:
                return self.act(super().forward(x))

        network = Tiny().eval().requires_grad_(False)
        network.branch[1] = Norm(8).eval().requires_grad_(False)
        for norm in (network.stem[1], network.branch[1]):
            assert isinstance(norm, nn.BatchNorm2d)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        x = torch.randn(2, 3, 20, 20)
        before = network(x)
        folded: Any = EagerFolded().prepare(network, MODELS["resnet50"], x)
        torch.testing.assert_close(folded(x), before)
        assert folded.get_submodule("stem.0").weight.is_contiguous(memory_format=torch.channels_last)
        with torch.profiler.profile() as profile:
            folded(x)
        assert not any("batch_norm" in event.key for event in profile.key_averages())
        torch.testing.assert_close(network(x), before, rtol=0, atol=0)

    def test_all_routes_give_the_same_answers(self, tiny: None, few_routes: None) -> None:
        made = models.measure(TINY, models.routes_for(setting()), NOISE, setting())
        assert made.failure is None
        assert [one.route for one in made.entries] == [*EAGER, FUSED, INDUCTOR_FROZEN]
        assert {one.memory_format for one in made.entries[1:]} == {"channels_last"}
        for one in made.entries:
            assert one.refused is None
            assert one.error
            assert one.agreement == 1.0
            assert one.seconds["launched"].count == 3
            assert one.speedups["launched"].count == 3
        fused = made.entry(FUSED)
        assert fused is not None
        assert (fused.fused_calls, fused.conv_calls) == (2, 2)
        assert made.references["launched"] in EAGER

    def test_algorithms_are_searched_only_for_what_is_timed(
        self, tiny: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[torch.dtype, bool]] = []

        class Recording(Tiny):
            def forward(self, x: Tensor) -> Tensor:
                seen.append((x.dtype, torch.backends.cudnn.benchmark))
                return super().forward(x)

        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        monkeypatch.setitem(model_cases.MODELS, "tiny", replace(model_cases.MODELS["tiny"], build=Recording))
        models.measure(TINY, (EagerChannelsLast(),), NOISE, setting())
        calibrations = model_cases.CALIBRATION_BATCHES
        assert seen[:calibrations] == [(torch.float32, False)] * calibrations
        assert set(seen[calibrations:]) == {(torch.float64, False), (torch.float32, True)}

    def test_the_backend_is_taken_where_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bench.model_routes.BACKEND_MODULE", "fused_cna.no_such_module")
        made = models._prepare(CompiledFused(), TINY, Tiny(), [], [], GPU)
        assert made[1] == {}
        assert "has no fused_cna.no_such_module" in str(made[0].left_out)
        assert judge([made[0]], PRECISIONS["fp32"], EAGER) is None

    def test_a_route_that_raises_leaves_the_others(self, tiny: None) -> None:
        made = models.measure(TINY, (EagerChannelsLast(), Refuses()), NOISE, setting())
        refused = made.entry("refuses")
        assert refused is not None
        assert refused.refused == "AttributeError: no such thing"
        assert refused.notes == ["careful"]
        assert made.failure is None
        assert made.speedup(EAGER[1]) is not None

    def test_a_result_that_is_not_written_whole_is_wrong(self, tiny: None) -> None:
        class Reuses(EagerChannelsLast):
            name, ours = "reuses", True

            def prepare(self, network: nn.Module, model: Model, x: Tensor) -> Call:
                kept: list[Tensor] = []

                def call(x: Tensor) -> Tensor:
                    if not kept:
                        kept.append(network(x))
                    return kept[0]

                return call

        made = models.measure(TINY, (EagerChannelsLast(), Reuses()), NOISE, setting())
        assert "reuses (channels_last): wrong result" in str(made.failure)


class TestJudge:
    def test_a_dropped_norm_is_a_failure(self, tiny: None) -> None:
        made = models.measure(TINY, (EagerChannelsLast(), DropsNorms()), NOISE, setting())
        assert "fused (channels_last): wrong result: relative error" in str(made.failure)
        assert made.speedup(FUSED) is None
        assert made.images_per_second(FUSED, "launched") is None

    def test_agreement_is_of_the_classes(self) -> None:
        expected = torch.tensor([[1.0, 2.0, 9.0], [2.0, 1.0, 9.0]])
        output = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
        assert models._agreement([output], [expected], classes=2) == 0.5
        assert models._agreement([output], [expected], classes=None) == 0.0
        pixels = torch.zeros(1, 3, 2, 2)
        other = pixels.clone()
        other[0, 1, 0, 0] = 1
        assert models._agreement([other], [pixels], classes=None) == 0.75


def test_the_rival_on_a_cpu_is_frozen_when_it_is_timed() -> None:
    """Compiled in another grad mode than it is timed in, inductor would compile it anew, and not frozen."""
    torch._dynamo.reset()
    x = torch.randn(2, 3, 20, 20)
    route = Compiled(INDUCTOR_FROZEN, "cpu", freezing=True)
    call = route.prepare(Tiny().eval().requires_grad_(False), MODELS["resnet50"], x)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        call(x)
    names = {event.key for event in profile.key_averages()}
    assert "mkldnn::_convolution_pointwise" in names
    assert not any("batch_norm" in name for name in names)
    torch._dynamo.reset()
