"""The fallback: what it writes over, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_cna import eager

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(dtype: torch.dtype = torch.float32, channels: int = 6, images: int = 2) -> list[Any]:
    """Of a 3x3 convolution of 4 channels, with a norm of ``channels`` channels."""
    vectors = [random(channels, dtype=dtype, seed=seed) for seed in range(3)]
    var = random(channels, dtype=dtype, seed=4).square() + 0.5
    x, weight = random(images, 4, 7, 9, dtype=dtype), random(6, 4, 3, 3, dtype=dtype, seed=5)
    return [x, weight, None, *vectors, var, 1e-5, (1, 1), (1, 1), (1, 1), 1, "silu", ()]


def three_steps(
    args: list[Any],
    residual: Tensor | None = None,
    order: str = "add_act",
    act: Callable[[Tensor], Tensor] = torch.nn.functional.silu,
) -> Tensor:
    x, weight, _, norm_weight, norm_bias, mean, var, eps = args[:8]
    z = torch.conv2d(x, weight, None, 1, 1)
    z = torch.batch_norm(z, norm_weight, norm_bias, mean, var, False, 0.0, eps, False)
    if residual is None:
        return act(z)
    return act(z + residual) if order == "add_act" else act(z) + residual


@pytest.fixture(autouse=True)
def no_grad(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(eager, "_LARGE", 1)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("order", ["add_act", "act_add"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_bit_for_bit_the_three_steps(
    dtype: torch.dtype, memory_format: torch.memory_format, has_residual: bool, order: str
) -> None:
    args = arguments(dtype)
    args[0] = args[0].contiguous(memory_format=memory_format)
    residual = random(2, 6, 7, 9, dtype=dtype, seed=9) if has_residual else None
    given = [tensor.clone() for tensor in (*args[:2], *args[3:7], *([residual] if has_residual else []))]
    expected = three_steps(args, residual, order)
    assert torch.equal(eager.conv_norm_act(*args, residual, order), expected)
    kept = (*args[:2], *args[3:7], *([residual] if has_residual else []))
    assert all(map(torch.equal, kept, given))


def test_takes_no_more_memory_than_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    conv2d = torch.conv2d
    monkeypatch.setattr(torch, "conv2d", lambda *args: made.append(conv2d(*args)) or made[-1])
    args = arguments()
    y = eager.conv_norm_act(*args[:-2], "relu", (), random(2, 6, 7, 9), "add_act")
    assert y.data_ptr() == made[0].data_ptr()
    with torch.enable_grad():
        z = eager.conv_norm_act(*args[:-2], "relu", (), random(2, 6, 7, 9), "add_act")
    assert z.data_ptr() != made[1].data_ptr()
    assert torch.equal(y, z)


@pytest.mark.parametrize("left_out", [(3,), (4,), (3, 4)], ids=str)
def test_without_affine_parameters(left_out: tuple[int, ...]) -> None:
    args = arguments()
    for index in left_out:
        args[index] = None
    assert torch.equal(eager.conv_norm_act(*args, None, "add_act"), three_steps(args))


def test_no_images() -> None:
    args = arguments(images=0)
    assert eager.conv_norm_act(*args, None, "add_act").shape == (0, 6, 7, 9)


@pytest.mark.parametrize("channels", [5, 7])
def test_a_norm_of_another_size_is_refused(channels: int) -> None:
    """The operator that works in place would read past the end of the vectors."""
    with pytest.raises(RuntimeError, match=f"should contain 6 elements not {channels}"):
        eager.conv_norm_act(*arguments(channels=channels), None, "add_act")


def test_norm_of_another_dtype() -> None:
    args = arguments(torch.bfloat16)
    args[3:7] = [tensor.float() for tensor in args[3:7]]
    assert torch.equal(eager.conv_norm_act(*args, None, "add_act"), three_steps(args))


def test_forward_gradient_and_vmap() -> None:
    args = arguments()

    def run(x: Tensor) -> Tensor:
        return eager.conv_norm_act(x, *args[1:], None, "add_act")

    def plain(x: Tensor) -> Tensor:
        return three_steps([x, *args[1:]])

    x, direction = args[0], random(2, 4, 7, 9, seed=11)
    torch.testing.assert_close(
        torch.func.jvp(run, (x,), (direction,)), torch.func.jvp(plain, (x,), (direction,))
    )
    stacked = torch.stack([x, x + 1])
    torch.testing.assert_close(torch.vmap(run)(stacked), torch.vmap(plain)(stacked))
    residuals = random(3, 2, 6, 7, 9)
    torch.testing.assert_close(
        torch.vmap(lambda residual: eager.conv_norm_act(*args, residual, "add_act"))(residuals),
        torch.stack([three_steps(args, residual) for residual in residuals]),
    )


def test_under_a_compiler() -> None:
    args = arguments()
    compiled = torch.compile(eager.conv_norm_act, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args, None, "add_act"), three_steps(args))
