"""``out=`` in the simulator: every kernel writes where it is told, and nowhere else is written unseen."""

from __future__ import annotations

import pytest
import torch

from tests.layouts import channel_slice
from tests.reference import DTYPES, expected_rounded, integer_problem
from tests.shapes import ConvShape, shape_named
from tests.simt import SimulatorError, binding, conv, conv_norm_act


def test_an_image_without_batch_dimension() -> None:
    problem = integer_problem(shape_named("odd_channels"), torch.float32)
    expected = expected_rounded(problem)[0]
    out = channel_slice(expected[None], 3, 2)[0]
    assert problem.replace(x=problem.x[0]).call(conv_norm_act, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("misalignment", [0, 2, 6, 8])
def test_the_kernel_sees_the_alignment_of_out(misalignment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[int] = []
    run = binding.run_conv
    monkeypatch.setattr(conv.binding, "run_conv", lambda call: (addresses.append(call.y.data), run(call))[1])
    problem = integer_problem(shape_named("3x3"), torch.float16)
    memory = torch.zeros(8 * 8 * 8 + 8, dtype=torch.float16)
    out = memory[misalignment // 2 :][: 8 * 8 * 8].view(1, 8, 8, 8)
    problem.call(conv_norm_act, out=out)
    assert torch.equal(out, expected_rounded(problem))
    assert addresses[0] % 16 == out.data_ptr() % 16 == misalignment


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("first", "count", "message"),
    [
        (0, 0, None),
        (-3, 1, r"wrote 1 elements outside its output of \d+: the first at -3 from its start$"),
        (6, 1, r"wrote 1 elements outside its output of \d+: the first at 6 from its start, between its el"),
        (4, 4, r"wrote 3 elements outside its output of \d+: the first at 5 from its start, between its el"),
    ],
)
def test_writes_between_the_elements_are_seen(
    dtype: torch.dtype, first: int, count: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that writes its slice, pixel by pixel, and then `count` elements from element `first` on."""
    problem = integer_problem(ConvShape("five", 1, 2, 3, 4, 5, 1, 1, "pixels of 5 channels in 8"), dtype)
    out = channel_slice(torch.zeros(1, 5, 3, 4, dtype=dtype), 1, 2)

    def write(call: binding.ConvCall) -> None:
        pixels = [(pixel * 8, 5) for pixel in range(12)]
        for start, elements in (*pixels, (first, count)):
            binding.ctypes.memset(call.y.data + start * dtype.itemsize, 0, elements * dtype.itemsize)

    monkeypatch.setattr(conv.binding, "run_conv", write)
    if message is None:
        assert torch.count_nonzero(problem.call(conv_norm_act, out=out)) == 0
        return
    with pytest.raises(SimulatorError, match=message):
        problem.call(conv_norm_act, out=out)
