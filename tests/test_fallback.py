"""When calls on CUDA tensors run as eager PyTorch: the warning, once, with its cause; the error where strict.

Fake CUDA tensors stand in for a GPU, so that all of this runs without one.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_cna
from fused_cna import ConvNormAct, FusionFallbackWarning, _extension, ops
from tests import reference
from tests.conftest import needs_gpu
from tests.reference import Problem, Wanted, expected_exactly, random_problem, relative_error
from tests.shapes import shape_named

CAUSE = "libplanted.so.13: cannot open shared object file"

PROBLEM = random_problem(shape_named("3x3"), torch.float32, Wanted("relu", residual_order="add_act"))
MODULE = ConvNormAct(8, 8).eval()


def call_front(dtype: torch.dtype) -> Tensor:
    """The front on fake CUDA tensors."""
    problem = PROBLEM.map(lambda tensor: torch.empty(tensor.shape, dtype=dtype, device="cuda"))
    return problem.call(fused_cna.conv_norm_act)


def call_module(dtype: torch.dtype) -> Tensor:
    """The module on fake CUDA tensors."""
    if not torch.backends.cuda.is_built():
        pytest.skip("modules with fake CUDA parameters need a torch built for CUDA")
    options = {"dtype": dtype, "device": "cuda"}
    conv, norm = nn.Conv2d(8, 8, 3, padding=1, **options), nn.BatchNorm2d(8, **options)
    return ConvNormAct.from_modules(conv, norm, nn.ReLU()).eval()(torch.empty(1, 8, 8, 8, **options))


calls = pytest.mark.parametrize("call", [call_front, call_module], ids=["front", "module"])


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing was warned about before, and tensors are fake."""
    monkeypatch.setattr(ops, "_warned_about", set())
    monkeypatch.setattr(fused_cna.config, "strict", False)
    with FakeTensorMode(), torch.no_grad():
        yield


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "is_available", lambda: False)
    monkeypatch.setattr(_extension, "unavailable_reason", lambda: CAUSE)


@pytest.fixture
def with_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose GPU the extension was built for."""
    monkeypatch.setattr(_extension, "is_available", lambda: True)
    monkeypatch.setattr(
        _extension, "build_info", lambda: {"architectures": ["sm_80", "sm_90a", "compute_90"]}
    )
    monkeypatch.setattr(ops, "_device_obstacles", {})
    pretend_gpu(monkeypatch, (9, 0))


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Pretended GPU")


def test_strict_is_off_by_default() -> None:
    assert runpy.run_path(str(fused_cna.config.__file__))["strict"] is False
    assert issubclass(FusionFallbackWarning, UserWarning)


@calls
@pytest.mark.usefixtures("no_extension")
def test_a_missing_extension_is_warned_about_once_with_its_cause(
    call: Callable[[torch.dtype], Tensor],
) -> None:
    with pytest.warns(FusionFallbackWarning) as caught:
        results = [call(dtype) for dtype in (torch.float16, torch.float16, torch.float32, torch.float32)]
    assert len(caught) == 1
    assert CAUSE in str(caught[0].message)
    if call is call_front:
        assert caught[0].filename == reference.__file__
    assert all(result.is_cuda for result in results)
    assert tuple(results[0].shape) == (1, 8, 8, 8)


@calls
@pytest.mark.usefixtures("no_extension")
def test_a_missing_extension_is_an_error_where_strict(
    call: Callable[[torch.dtype], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_cna.config, "strict", True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="strict") as caught:
            call(torch.float16)
        assert CAUSE in str(caught.value)


def call_with_out(dtype: torch.dtype) -> Tensor:
    """The front on fake CUDA tensors, into a channel slice."""
    problem = PROBLEM.map(lambda tensor: torch.empty(tensor.shape, dtype=dtype, device="cuda"))
    out = torch.empty(1, 20, 8, 8, dtype=dtype, device="cuda")[:, 6:14]
    assert problem.call(fused_cna.conv_norm_act, out=out) is out
    return out


@pytest.mark.usefixtures("no_extension")
def test_results_in_given_memory_fall_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(FusionFallbackWarning, match="libplanted") as caught:
        assert [call_with_out(dtype).dtype for dtype in (torch.float16, torch.float32)]
    assert len(caught) == 1
    assert caught[0].filename == reference.__file__
    monkeypatch.setattr(fused_cna.config, "strict", True)
    with pytest.raises(RuntimeError, match="libplanted"):
        call_with_out(torch.float16)


@pytest.mark.usefixtures("with_extension")
def test_results_in_given_memory_have_the_same_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(FusionFallbackWarning, match="float64"):
        call_with_out(torch.float64)
    monkeypatch.setattr(fused_cna.config, "strict", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call_with_out(torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="float64"):
        call_with_out(torch.float64)


@calls
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.usefixtures("with_extension")
def test_a_dtype_without_kernels_is_warned_about_once(
    call: Callable[[torch.dtype], Tensor], dtype: torch.dtype
) -> None:
    if dtype.is_complex:
        call = call_complex
    with pytest.warns(FusionFallbackWarning) as caught:
        results = [call(dtype) for _ in range(3)]
    assert len(caught) == 1
    for word in (str(dtype), "float32", "float16", "bfloat16"):
        assert word in str(caught[0].message)
    assert results[0].dtype == dtype


def call_complex(dtype: torch.dtype) -> Tensor:
    """A bare convolution: torch normalises and clips no complex numbers."""
    x, weight = (
        torch.empty(1, 4, 5, 5, dtype=dtype, device="cuda"),
        torch.empty(3, 4, 3, 3, dtype=dtype, device="cuda"),
    )
    return fused_cna.conv_norm_act(x, weight)


@calls
@pytest.mark.usefixtures("with_extension")
def test_a_dtype_without_kernels_is_an_error_where_strict(
    call: Callable[[torch.dtype], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_cna.config, "strict", True)
    with pytest.raises(RuntimeError, match="float64"):
        call(torch.float64)


@pytest.mark.usefixtures("with_extension")
def test_another_cause_is_another_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(FusionFallbackWarning, match="float64"):
        call_front(torch.float64)
    monkeypatch.setattr(_extension, "is_available", lambda: False)
    monkeypatch.setattr(_extension, "unavailable_reason", lambda: CAUSE)
    with pytest.warns(FusionFallbackWarning, match="libplanted"):
        call_front(torch.float64)


@calls
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("with_extension")
def test_what_has_a_kernel_does_not_fall_back(
    call: Callable[[torch.dtype], Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_cna.config, "strict", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(dtype).dtype == dtype


@calls
@pytest.mark.parametrize(
    ("capability", "words"),
    [((7, 5), ("7.5", "8.0", "Pretended GPU")), ((8, 0), ()), ((8, 9), ()), ((9, 0), ()), ((12, 0), ())],
)
@pytest.mark.usefixtures("with_extension")
def test_gpus_too_old_fall_back(
    call: Callable[[torch.dtype], Tensor],
    capability: tuple[int, int],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_gpu(monkeypatch, capability)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(torch.float16)
    messages = [str(warning.message) for warning in caught if warning.category is FusionFallbackWarning]
    assert bool(messages) == bool(words)
    for word in words:
        assert word in messages[0]


@pytest.mark.parametrize("architectures", [["sm_80"], ["sm_90a"], ["sm_90"], ["compute_90"]], ids=str)
@pytest.mark.usefixtures("with_extension")
def test_an_extension_for_another_gpu_falls_back(
    architectures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machine code runs within its major version, sm_90a only on 9.0, and PTX on anything at least as new."""
    monkeypatch.setattr(_extension, "build_info", lambda: {"architectures": architectures})
    runs = {
        "sm_80": [(8, 0), (8, 6)],
        "sm_90a": [(9, 0)],
        "sm_90": [(9, 0)],
        "compute_90": [(9, 0), (10, 0), (12, 0)],
    }
    for capability in [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)]:
        pretend_gpu(monkeypatch, capability)
        monkeypatch.setattr(ops, "_device_obstacles", {})
        monkeypatch.setattr(ops, "_warned_about", set())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call_front(torch.float16)
        assert bool(caught) == (capability not in runs[architectures[0]]), capability


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.usefixtures("no_extension")
def test_cpu_tensors_never_warn(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_cna.config, "strict", strict)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = fused_cna.conv_norm_act(torch.empty(1, 4, 5, 5), torch.empty(3, 4, 3, 3))
        z = ConvNormAct.from_modules(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval()(torch.empty(1, 4, 5, 5))
    assert [str(warning.message) for warning in caught] == []
    assert ops._warned_about == set()
    assert (y.shape, z.shape) == ((1, 3, 3, 3), (1, 6, 3, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("strict", [False, True])
def test_float64_on_a_gpu(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_gpu()
    monkeypatch.setattr(fused_cna.config, "strict", strict)
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        problem: Problem = PROBLEM.map(Tensor.double)
        placed = problem.map(Tensor.cuda)
        if strict:
            with pytest.raises(RuntimeError, match="float64"):
                placed.call(fused_cna.conv_norm_act)
            return
        with pytest.warns(FusionFallbackWarning, match="float64"):
            actual = placed.call(fused_cna.conv_norm_act)
        assert relative_error(actual, expected_exactly(problem)) < 1e-12


def test_without_the_extension_the_operator_differentiates_all_the_same() -> None:
    """In a process of its own: an extension, once loaded, has registered its kernels for good."""
    code = """
import sys
sys.modules["fused_cna._C"] = None
import torch, fused_cna
assert not fused_cna.build_info()["available"]
from tests.test_operator import GRADIENT_PROBLEMS, gradient_problem, three_steps
operator, out_operator = torch.ops.fused_cna.conv_norm_act, torch.ops.fused_cna.conv_norm_act_out
problem, names = gradient_problem(GRADIENT_PROBLEMS["add_act"])
tensors = [getattr(problem, name) for name in names]
wanted = torch.autograd.grad(three_steps(problem).square().sum(), tensors)
given = torch.autograd.grad(operator(*problem.operator_arguments()).square().sum(), tensors)
for mine, theirs in zip(given, wanted, strict=True):
    torch.testing.assert_close(mine, theirs)
out = torch.empty_like(three_steps(problem))
with torch.no_grad():
    out_operator(*problem.operator_arguments(), out)
    torch.testing.assert_close(out, three_steps(problem))
    assert not operator(*problem.operator_arguments()).requires_grad
try:
    out_operator(*problem.operator_arguments(), out)
except RuntimeError as error:
    assert "don't support automatic differentiation" in str(error)
else:
    raise AssertionError("out was written where a gradient is wanted")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
