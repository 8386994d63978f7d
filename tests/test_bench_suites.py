"""Which layers are measured, where they come from, in which order, and what the planner says of them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import networks
from bench.dataflow import convolutions, distinct
from bench.layer_list import ROLES, Layer, Role, parse, read_rows, select
from bench.networks import NETWORKS, instantiated, layers_of_network, recorded
from bench.plans import plan_of, planner_device
from bench.roofline import flops
from bench.rows import SUITES, Row, layers_of, network_floor, ordered_rows
from tests.bench_cases import CEILINGS, CPU, CSV_ROW, layer, row


class TestRoles:
    def test_every_role_has_a_row_and_every_name_is_its_own(self) -> None:
        chosen = layers_of("default")
        assert [one.role for one in chosen] == [role.name for role in ROLES]
        assert len({one.name for one in chosen}) == len(chosen)
        assert all(one.models >= 2 and one.uses == 1 for one in chosen)

    def test_quick_is_the_beginning_of_default(self) -> None:
        quick = layers_of("quick")
        assert 0 < len(quick) < len(layers_of("default"))
        assert quick == layers_of("default")[: len(quick)]

    def test_kinds_that_must_be_there(self) -> None:
        chosen = layers_of("default")
        assert {one.kh for one in chosen if one.depthwise} == {3, 5, 7}
        assert any(1 < one.groups < one.cin for one in chosen)
        assert any(one.dil_h > 1 for one in chosen)
        assert any(one.cin == 3 for one in chosen)
        assert any((one.h, one.w) == (1, 1) for one in chosen)
        assert {one.residual_order for one in chosen} == {None, "add_act", "act_add"}

    def test_most_used_row_of_at_least_two_networks_is_chosen(self) -> None:
        rows = [
            CSV_ROW | {"uses": "9", "models": "1", "cin": "1"},
            CSV_ROW | {"uses": "5", "models": "2", "cin": "2"},
            CSV_ROW | {"uses": "7", "models": "2", "cin": "3"},
            CSV_ROW | {"uses": "8", "models": "2", "cin": "4", "kh": "5"},
        ]
        assert select(Role("r", {"kh": "3"}), rows).cin == 3
        with pytest.raises(LookupError, match=r"no row .* matches the role 'r'"):
            select(Role("r", {"kh": "11"}), rows)

    def test_rows_are_complete(self) -> None:
        assert len(read_rows()) > 3000
        assert set(CSV_ROW) == set(read_rows()[0])

    def test_unknown_suite_lists_the_known(self) -> None:
        with pytest.raises(ValueError, match=", ".join(SUITES)):
            layers_of("everything")

    def test_names(self) -> None:
        assert layer(cin=4).name == "3x3 4 @6 BN ReLU"
        assert layer(groups=8, cout=8, stride_h=2, stride_w=2).name == "dw 3x3 s2 8 @6 BN ReLU"
        assert layer(groups=2, dil_h=2, residual="add_act").name == "3x3 d2 g2 8->4 @6 BN add ReLU"
        assert (
            layer(norm="none", conv_bias=True, act="none", residual="act_add").name == "3x3 8->4 @6 bias add"
        )

    @pytest.mark.parametrize("one", layers_of("default"), ids=lambda one: one.name)
    def test_output_size_is_the_one_torch_computes(self, one: Layer) -> None:
        conv = nn.Conv2d(
            one.cin,
            one.cout,
            (one.kh, one.kw),
            (one.stride_h, one.stride_w),
            (one.pad_h, one.pad_w),
            (one.dil_h, one.dil_w),
            one.groups,
            device="meta",
        )
        assert conv(torch.empty(1, one.cin, one.h, one.w, device="meta")).shape[2:] == (one.out_h, one.out_w)


# Convolutions, distinct geometries, and the published billions of multiply-adds at the suite's image size;
# those count a last linear layer too, which is at most 1 %, and deeplabv3's auxiliary head, used in training.
AUXILIARY_HEAD = 65 * 65 * 256 * (9 * 1024 + 21) / 1e9
FACTS = {
    "resnet50": (53, 23, 4.089),
    "mobilenet_v2": (52, 30, 0.301),
    "efficientnet_b0": (81, None, 0.386),
    "regnet_y": (140, None, 1.612),
    "resnext50": (53, None, 4.23),
    "vgg16_bn": (13, 9, 15.47),
    "segmentation": (61, None, 178.722 - AUXILIARY_HEAD),
}
GEOMETRY = ("cin", "cout", "kh", "kw", "stride_h", "dil_h", "groups", "h", "w")


class TestNetworks:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_record_is_what_the_libraries_build(self, name: str) -> None:
        pytest.importorskip(NETWORKS[name].library, reason="the network is that library's")
        assert instantiated(name) == recorded(name)

    @pytest.mark.parametrize("name", FACTS)
    def test_counts_and_arithmetic_are_the_known_ones(self, name: str) -> None:
        layers = layers_of_network(name)
        convolutions, geometries, billions = FACTS[name]
        assert sum(one.uses for one in layers) == convolutions
        if geometries is not None:
            assert len({tuple(getattr(one, part) for part in GEOMETRY) for one in layers}) == geometries
        assert sum(one.uses * flops(one, 1) for one in layers) / 2e9 == pytest.approx(billions, rel=0.012)

    @pytest.mark.parametrize("name", [name for name in NETWORKS if NETWORKS[name].image == (224, 224)])
    def test_every_layer_is_in_the_survey_of_networks(self, name: str) -> None:
        # The survey was made by other means, so what follows each convolution is confirmed by it.
        known = {replace(parse(one, ""), uses=1, models=1) for one in read_rows()}
        assert [one.name for one in layers_of_network(name) if replace(one, uses=1) not in known] == []

    def test_what_the_suites_are_for(self) -> None:
        assert {one.act for one in layers_of("yolo")} == {"SiLU"}
        assert sum(one.uses for one in layers_of("yolo") if one.residual == "act_add") == 23
        assert {one.dil_h for one in layers_of("segmentation")} == {1, 2, 4, 12, 24, 36}
        assert {one.groups for one in layers_of("resnext50")} == {1, 32}
        assert any(one.depthwise and one.kh == 5 for one in layers_of("efficientnet_b0"))
        resnet = layers_of("resnet50")
        assert sum(one.uses for one in resnet if one.residual == "add_act") == 16
        assert sum(one.uses for one in resnet if one.act == "none") == 4

    def test_a_missing_library_is_replaced_by_the_record(self, monkeypatch: pytest.MonkeyPatch) -> None:
        missing = replace(NETWORKS["vgg16_bn"], library="no_such_library")
        monkeypatch.setitem(networks.NETWORKS, "vgg16_bn", missing)
        layers_of_network.cache_clear()
        assert layers_of_network("vgg16_bn") == recorded("vgg16_bn")
        assert networks.source_of("vgg16_bn") == (
            "data/networks.csv, as no_such_library is not installed here"
        )
        layers_of_network.cache_clear()

    def test_a_record_without_the_network_says_what_to_do(self, tmp_path: Path) -> None:
        (tmp_path / "empty.csv").write_text("suite\n")
        with pytest.raises(LookupError, match=r"no rows for 'yolo'.* python -m bench.networks"):
            recorded("yolo", tmp_path / "empty.csv")


class Branches(nn.Module):
    """An addition whose operands are both convolutions', and one that something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm(self.first(x))
        b = self.second(x)
        b += a
        c = torch.relu(b)
        d = nn.functional.silu(self.third(c), inplace=True) + c
        return d * d


class TestDataflow:
    def follow(self, module: nn.Module) -> list[tuple[str, str, str]]:
        found = convolutions(module.eval().to("meta"), (5, 6))
        return [(one.norm, one.act, one.residual) for one in found]

    def test_the_branch_that_runs_last_adds(self) -> None:
        assert self.follow(Branches()) == [
            ("BatchNorm2d", "none", "none"),
            ("none", "ReLU", "add_act"),
            ("none", "SiLU", "act_add"),
        ]

    def test_what_others_read_is_not_fused(self) -> None:
        class Shared(Branches):
            def forward(self, x: Tensor) -> Tensor:
                z = self.first(x)
                return torch.cat([self.norm(z), torch.relu(z)])

        assert self.follow(Shared()) == [("none", "none", "none")]

    def test_an_addition_of_another_shape_or_of_itself_is_no_residual(self) -> None:
        class Broadcast(Branches):
            def forward(self, x: Tensor) -> Tensor:
                z = self.first(x)
                z = z + x.mean((2, 3), keepdim=True)
                y = self.second(z)
                return y + y

        assert self.follow(Broadcast()) == [("none", "none", "none")] * 2

    def test_geometry_and_uses(self) -> None:
        conv = nn.Conv2d(3, 3, (3, 1), (1, 1), (1, 0), (1, 2), groups=3, bias=False)
        (one,) = distinct(convolutions(nn.Sequential(conv, conv, nn.ReLU6()).to("meta"), (7, 9))[:1] * 2)
        assert (one.kh, one.kw, one.pad_h, one.pad_w, one.dil_w, one.groups) == (3, 1, 1, 0, 2, 3)
        assert (one.h, one.w, one.conv_bias, one.uses) == (7, 9, False, 2)
        last = convolutions(nn.Sequential(conv, nn.ReLU6()).to("meta"), (7, 9))
        assert last[0].act == "ReLU6"


class TestOrder:
    def rows(self, suites: tuple[str, ...], batches: tuple[int, ...] = (1,)) -> list[Row]:
        return ordered_rows(suites, batches, ("fp16",), {"fp16": CEILINGS})

    def test_largest_share_of_the_floor_first(self) -> None:
        rows = self.rows(("resnet50",))
        floors = [network_floor(one, "resnet50", CEILINGS) for one in rows]
        assert floors == sorted(floors, reverse=True)
        assert len(rows) == len(layers_of("resnet50"))
        # Uses count, not the layer's own time alone.
        alone = [floor / one.uses["resnet50"] for floor, one in zip(floors, rows, strict=True)]
        assert alone != sorted(alone, reverse=True)

    def test_suites_and_batches_take_turns(self) -> None:
        rows = self.rows(("vgg16_bn", "yolo"), (8, 1))
        turns = [(one.batch, next(iter(one.uses))) for one in rows]
        once = [(8, "vgg16_bn"), (8, "yolo"), (1, "vgg16_bn"), (1, "yolo")]
        assert turns[:8] == once * 2

    def test_a_shared_layer_is_measured_once_for_all_suites(self) -> None:
        rows = self.rows(("resnet50", "resnext50"))
        shared = [one for one in rows if len(one.uses) == 2]
        assert any(one.layer.kh == 7 for one in shared)
        assert len({one.key for one in rows}) == len(rows)
        assert sum(one.uses.get("resnext50", 0) for one in rows) == 53

    def test_role_suites_keep_their_order(self) -> None:
        assert [one.layer for one in self.rows(("default",))] == list(layers_of("default"))

    def test_key_has_every_number_and_no_suite(self) -> None:
        assert row(quick=1).key == row(other=7).key
        assert row(layer(uses=9)).key == row().key
        different = [row(layer(w=7)), row(layer(act="SiLU")), row(batch=3), row(precision="tf32")]
        assert len({one.key for one in (row(), *different)}) == 5
        assert row().name == "fp32 n2 3x3 8->4 @6 BN ReLU"


class TestPlans:
    @pytest.mark.parametrize(
        ("torch_name", "planner_name"),
        [
            ("NVIDIA H100 80GB HBM3", "H100"),
            ("NVIDIA GeForce RTX 4090", "RTX 4090"),
            ("NVIDIA L4", "L4"),
            ("NVIDIA L40S", None),
            ("NVIDIA A100-SXM4-80GB", "A100"),
        ],
    )
    def test_device_names(self, torch_name: str, planner_name: str | None) -> None:
        assert planner_device(torch_name) == planner_name

    def test_a_row_is_explained(self) -> None:
        pytest.importorskip("fused_cna._plan", reason="the planner is compiled")
        chosen, reason = plan_of(row(layer(cin=64, cout=64), precision="fp16"), CPU, "a processor")
        assert reason is None
        assert chosen is not None
        assert (chosen.device, chosen.split_k >= 1, chosen.estimate_us > 0) == ("H100", True, True)
        assert chosen.kernel in chosen.text

    def test_tf32_and_fp32_are_asked_as_they_are(self) -> None:
        pytest.importorskip("fused_cna._plan", reason="the planner is compiled")
        large = layer(cin=256, cout=256, h=56, w=56)
        kernels = [plan_of(row(large, 32, name), CPU, "")[0] for name in ("tf32", "fp32")]
        assert kernels[0] is not None
        assert kernels[1] is not None
        assert kernels[1].kernel == "implicit_gemm_tf32x3" != kernels[0].kernel

    def test_no_plan_has_a_reason(self) -> None:
        chosen, reason = plan_of(row(), torch.device("cuda"), "NVIDIA L40S")
        assert chosen is None
        assert str(reason).startswith("the planner does not know 'NVIDIA L40S'; it knows A100, L4")
