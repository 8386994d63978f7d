"""Small layers, settings, records and a pretended cuDNN that the tests of the bench share."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.cases import PRECISIONS, Layer
from bench.measure import Budget, Setting
from bench.result import Entry, Record, summarize
from bench.routes import BASELINE, FUSED

CPU = torch.device("cpu")
CEILINGS = {"bytes_per_second": 1e9, "flops_per_second": 1e12, "matrix_precision": "float32"}
FACTS = {
    "floor": {"seconds": 1e-4, "bound": "memory"},
    "flops": 10**6,
    "least_bytes": 10**5,
    "rotation": {"outruns_cache": True},
    "plan": None,
    "why_no_plan": "no planner",
}


def layer(**changes: Any) -> Layer:
    made = Layer(8, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1, 6, 5, "BatchNorm2d", "ReLU", "none", False)
    return replace(made, **changes)


def setting(*, budget: Budget | float | None = None, **changes: Any) -> Setting:
    limit = budget if isinstance(budget, Budget) else Budget(budget)
    made = Setting(CPU, (PRECISIONS["fp32"],), limit, batches=(2,), rounds=3, layer_seconds=0.0)
    return replace(made, network_seconds=0.0, **changes)


class FakeClock:
    """Seconds that pass only where work says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def seconds(self, work: Callable[[], object]) -> float:
        start = self.now
        work()
        return self.now - start


def entry(route: str, *seconds: float, launch: str = "launched", **changes: Any) -> Entry:
    """Right, and timed in as many rounds as there are seconds."""
    kinds = {"ours": route.startswith(FUSED), "eager": route in (BASELINE, "eager")}
    made = Entry(route, "channels_last", error=1e-7, agreement=1.0, **kinds)
    if seconds:
        made.samples = {launch: list(seconds)}
        made.seconds = {launch: summarize(seconds)}
    return replace(made, **changes)


def record(*routes: Entry, kind: str = "layer", name: str = "a layer", **changes: Any) -> Record:
    made = Record(kind, name, name, 2, "fp32", {"quick": 1}, FACTS | {"images": "noise"}, list(routes))
    made = replace(made, **changes)
    made.compare()
    return made


class FakeTensor:
    """A tensor of a pretended graph: what it is computed of."""

    def __init__(self, made: Callable[[dict[Any, Tensor]], Tensor], **about: Any) -> None:
        self.value, self.about = made, about

    def set_output(self, output: bool) -> "FakeTensor":
        return self

    def set_data_type(self, data_type: object) -> "FakeTensor":
        return self


class FakeGraph:
    """cuDNN's graph, computed by torch in float32. Plan 0 was not built, 1 is slow, 2 is fast."""

    seconds = (math.nan, 2.0, 1.0)

    def __init__(self, clock: FakeClock, refusal: str, **types: object) -> None:
        self.clock, self.refusal, self.operations = clock, refusal, list[str]()
        self.notes: list[object] = []

    def tensor(self, **about: Any) -> FakeTensor:
        def value(pack: dict[Any, Tensor]) -> Tensor:
            given = pack[made]
            assert tuple(given.shape) == tuple(about["dim"])
            strides = zip(given.stride(), about["stride"], about["dim"], strict=True)
            assert all(one == other for one, other, size in strides if size > 1)
            return given.float()

        made = FakeTensor(value, **about)
        return made

    def conv_fprop(self, image: FakeTensor, weight: FakeTensor, **geometry: list[int]) -> FakeTensor:
        groups = image.about["dim"][1] // weight.about["dim"][1]
        self.operations.append("conv")
        return FakeTensor(
            lambda pack: torch.conv2d(image.value(pack), weight.value(pack), groups=groups, **geometry)  # type: ignore[call-overload]
        )

    def __getattr__(self, name: str) -> Any:
        functions: dict[str, Callable[..., Tensor]] = {
            "add": torch.add,
            "mul": torch.mul,
            "relu": lambda x, lower_clip=0.0, upper_clip=math.inf: x.clamp(lower_clip, upper_clip),
            "leaky_relu": torch.nn.functional.leaky_relu,
            "elu": torch.nn.functional.elu,
            "swish": torch.nn.functional.silu,
            "gelu": torch.nn.functional.gelu,
            "gelu_approx_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
            "sigmoid": torch.sigmoid,
            "tanh": torch.tanh,
            "softplus": torch.nn.functional.softplus,
        }
        if name not in functions:
            raise AttributeError(name)

        def build(**inputs: Any) -> FakeTensor:
            self.operations.append(name)
            tensors = [one for one in inputs.values() if isinstance(one, FakeTensor)]
            options = {n: one for n, one in inputs.items() if not isinstance(one, FakeTensor)}
            return FakeTensor(lambda pack: functions[name](*(one.value(pack) for one in tensors), **options))

        return build

    def validate(self) -> None:
        if self.refusal:
            raise ValueError(self.refusal)

    def nothing(self, *ignored: object) -> None:
        pass

    build_operation_graph = create_execution_plans = check_support = build_plans = nothing

    def deselect_numeric_notes(self, notes: list[object]) -> None:
        self.notes = notes

    def get_execution_plan_count(self) -> int:
        return len(self.seconds)

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        if math.isnan(self.seconds[index]):
            raise ValueError("it was not built")
        return 0

    def execute_plan_at_index(
        self, pack: dict[Any, Tensor], workspace: Tensor, index: int, handle: str
    ) -> None:
        assert handle == "handle"
        outputs = [tensor for tensor in pack if not tensor.about]
        pack[outputs[0]].copy_(outputs[0].value(pack))
        self.clock.spend(self.seconds[index])


def fake_cudnn(clock: FakeClock, refusal: str = "") -> Any:
    """The module `cudnn` of nvidia-cudnn-frontend; `graphs` are those that were made."""
    names = SimpleNamespace
    made = names(graphs=[])

    def pygraph(**types: object) -> FakeGraph:
        made.graphs.append(FakeGraph(clock, refusal, **types))
        return made.graphs[-1]  # type: ignore[no-any-return]

    made.pygraph = pygraph
    made.create_handle, made.set_stream = lambda: "handle", lambda handle, stream: None
    made.data_type = names(HALF="half", BFLOAT16="bfloat16", FLOAT="float")
    made.heur_mode, made.build_plan_policy = names(A="A", B="B", FALLBACK="fallback"), names(ALL="all")
    made.numerical_note = names(TENSOR_CORE="tensor core", DOWN_CONVERT_INPUTS="down")
    return made
