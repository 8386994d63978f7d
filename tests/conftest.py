"""Where a test runs its problems: eager PyTorch on the CPU, the kernels in the simulator, or a GPU."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from torch import Tensor

import fused_cna
from tests.layouts import moved
from tests.reference import Problem, expected_exactly, relative_error
from tests.sass import (
    SHARED_BYTES_PER_MULTIPROCESSOR,
    Compiled,
    find_extension,
    read_extension,
    why_unreadable,
)

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1)

# torch's own test utilities freeze its global flags when a test first imports them; later tests set some.
torch.backends.disable_global_flags = lambda: None

# What the user of this machine has tuned is nothing to the tests.
os.environ["FUSED_CNA_PLAN_FILE"] = os.devnull

NO_GPU = "needs a CUDA device, and torch sees none"


def needs_gpu() -> None:
    """Skips the running test where there is no GPU."""
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="every fourth case of a test, and no slow one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("quick"):
        return
    cases, kept, left_out = Counter[str](), [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        is_kept = cases[test] % 4 == 0 and not item.get_closest_marker("slow")
        (kept if is_kept else left_out).append(item)
        cases[test] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """A process that has lost the GPU never gets it back, and fails every later test: it ends.

    xdist lays the end to this test, and starts another worker for the rest.
    """
    done = yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if hasattr(item.config, "workerinput"):
                os._exit(1)
            pytest.exit(f"{item.nodeid} lost the GPU: {error}")
    return done


class Backend:
    """One way to run a problem; problems are built on the CPU and moved to `device` by `place`."""

    device = "cpu"

    def place(self, problem: Problem) -> Problem:
        return problem.map(lambda tensor: moved(tensor, self.device))

    def run(self, problem: Problem, **extra: object) -> Tensor:
        """The result for a problem whose tensors are on `device`.

        `extra` are further arguments of `conv_norm_act`, `plan`, the name of the plan to run, and
        `allow_tf32`, whether it may round float32 to tf32.
        """
        raise NotImplementedError

    def thread_order(self, seed: int) -> dict[str, object]:
        """What to pass to `run` to have threads run in another order, where that can be chosen."""
        return {}

    def planned_for(self, device: str) -> str | None:
        """Whose plans it runs where those of a device are wanted, for `tests.plans.plan_names`."""
        return device

    def on(self, device: str) -> dict[str, object]:
        """What to pass to `run` for the plans of that device, where they can be chosen."""
        return {}

    def eager_error(self, problem: Problem) -> float:
        """The eager three-step's error, where the error bound leans on it."""
        return 0.0


class Simulator(Backend):
    """The CUDA kernels, run thread by thread on the CPU."""

    def run(self, problem: Problem, **extra: object) -> Tensor:
        from tests.simt import conv_norm_act

        return problem.call(conv_norm_act, **extra)

    def thread_order(self, seed: int) -> dict[str, object]:
        return {"seed": seed}

    def on(self, device: str) -> dict[str, object]:
        return {"device": device}


class Gpu(Backend):
    """The CUDA kernels on the GPU."""

    device = "cuda"

    def planned_for(self, device: str) -> str | None:
        return None

    def run(self, problem: Problem, *, plan: str = "", allow_tf32: bool = False, **extra: object) -> Tensor:
        with fused_cna.forced_plan(plan), convolutions_in_float32(allow_tf32):
            return problem.call(fused_cna.conv_norm_act, **extra)

    def eager_error(self, problem: Problem) -> float:
        from fused_cna.eager import conv_norm_act

        return relative_error(conv_norm_act(*problem.operator_arguments()), expected_exactly(problem))


@contextlib.contextmanager
def convolutions_in_float32(allow_tf32: bool = False) -> Iterator[None]:
    """Float32 convolutions on a GPU without tf32, or with it.

    By the one way that sets the old and the new switches alike, which torch.export wants, and that torch's
    own test utilities leave open.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allow_tf32):
        yield


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The kernels, simulated and real. On a GPU a fallback to eager is an error."""
    if request.param == "simt":
        yield Simulator()
        return
    needs_gpu()
    monkeypatch.setattr(fused_cna.config, "strict", True)
    # Eager's error is part of the bound: in tf32 it would allow a float32 kernel a thousand times too much.
    with convolutions_in_float32(), torch.inference_mode():
        yield Gpu()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device for modules, on which float32 convolutions keep float32's precision."""
    if request.param == "cuda":
        needs_gpu()
    with convolutions_in_float32():
        yield request.param


@pytest.fixture(scope="session")
def built_kernels() -> dict[str, Compiled]:
    """The kernels in the built extension, by architecture."""
    extension = find_extension()
    if reason := why_unreadable(extension):
        pytest.skip(reason)
    assert extension is not None
    return read_extension(extension)


@pytest.fixture(params=SHARED_BYTES_PER_MULTIPROCESSOR)
def compiled(request: pytest.FixtureRequest, built_kernels: dict[str, Compiled]) -> Compiled:
    """The kernels in the built extension, for one architecture after the other."""
    if request.param not in built_kernels:
        pytest.skip(f"the extension was not built for {request.param}")
    return built_kernels[request.param]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing was compiled before, and nothing that is compiled now stays."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would run as a kernel on a GPU goes to the operator on the CPU as well."""
    monkeypatch.setattr(fused_cna.ops, "operator_everywhere", True)


@pytest.fixture
def graphs(fresh_dynamo: None) -> object:
    """The backend of ``torch.compile``, which remembers the graphs that it was given."""
    from tests.compiled_networks import Graphs

    return Graphs()
