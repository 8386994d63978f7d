"""Ways to lay a tensor out in memory: each takes a contiguous tensor and returns one of the same shape.

All but `expanded` and `expanded_channels` keep the values. Where the new storage is larger than the tensor,
the rest of it is NaN, so that a read outside the view poisons the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def transposed(tensor: Tensor) -> Tensor:
    """Columns outermost of an image: W before H."""
    return _permuted(tensor, (0, 1, 3, 2))


def batch_innermost(tensor: Tensor) -> Tensor:
    return _permuted(tensor, (1, 2, 3, 0))


def sliced(tensor: Tensor) -> Tensor:
    """A window in every dimension of a larger contiguous tensor, starting at an odd element."""
    return _window(tensor, range(tensor.dim()), step=1)


def sliced_channels_last(tensor: Tensor) -> Tensor:
    """A window of a larger channels_last tensor."""
    return _window(tensor, (0, 2, 3, 1), step=1)


def every_second(tensor: Tensor) -> Tensor:
    """Every second element of each dimension."""
    return _window(tensor, range(tensor.dim()), step=2)


def misaligned(tensor: Tensor) -> Tensor:
    """Contiguous, but one element past where the allocator put it."""
    storage = _poisoned(tensor, (tensor.numel() + 1,))
    return storage[1:].view(tensor.shape).copy_(tensor)


def misaligned_channels_last(tensor: Tensor) -> Tensor:
    n, c, h, w = tensor.shape
    storage = _poisoned(tensor, (tensor.numel() + 1,))
    return storage[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(tensor)


def expanded(tensor: Tensor) -> Tensor:
    """The first image for every image: a batch stride of 0."""
    return tensor[:1].expand(tensor.shape)


def expanded_channels(tensor: Tensor) -> Tensor:
    """The first channel and row for every channel and row: two strides of 0."""
    return tensor[:, :1, :1].expand(tensor.shape)


def every_second_pixel_aligned(tensor: Tensor) -> Tensor:
    """Channels last, with every second pixel on a 16-byte boundary and the others between two."""
    n, c, h, w = tensor.shape
    pitch = -(-c * tensor.element_size() // 16) * 16 + 8
    storage = _poisoned(tensor, (n, h, w, pitch // tensor.element_size()))
    return storage[..., :c].permute(0, 3, 1, 2).copy_(tensor)


def channel_slice(tensor: Tensor, before: int = 5, behind: int = 2) -> Tensor:
    """A slice of the channels of a larger channels_last tensor."""
    n, c, h, w = tensor.shape
    storage = _poisoned(tensor, (n, h, w, before + c + behind)).permute(0, 3, 1, 2)
    return storage[:, before : before + c].copy_(tensor)


def aligned_channel_slice(tensor: Tensor) -> Tensor:
    """The same, with every pixel on a 16-byte boundary."""
    return channel_slice(tensor, 16, 8 + -tensor.shape[1] % 8)


def taps_apart(weight: Tensor) -> Tensor:
    """A weight as some taps of larger filters: dense channels, and gaps between the taps."""
    k, c, r, s = weight.shape
    larger = _poisoned(weight, (k, r + 2, 2 * s, c)).permute(0, 3, 1, 2)
    return larger[:, :, 1:-1, ::2].copy_(weight)


LAYOUTS: tuple[Layout, ...] = (
    contiguous,
    channels_last,
    transposed,
    batch_innermost,
    sliced,
    sliced_channels_last,
    every_second,
    misaligned,
    misaligned_channels_last,
    expanded,
    expanded_channels,
)


def odd_unit_strides(tensor: Tensor, stride: int) -> Tensor:
    """Gives each dimension of size 1 the stride `stride`, which nothing may read."""
    strides = [stride if size == 1 else old for size, old in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(tensor.shape, strides)


def far_unit_strides(tensor: Tensor) -> Tensor:
    """A copy that would lie far outside its memory if dimensions of size 1 were stepped along."""
    return odd_unit_strides(tensor.clone(), 2**40)


def vector_every_third(vector: Tensor) -> Tensor:
    storage = _poisoned(vector, (3 * vector.numel() + 1,))
    view = storage[1::3]
    return view.copy_(vector)


def _permuted(tensor: Tensor, order: Sequence[int]) -> Tensor:
    inverse = [list(order).index(dim) for dim in range(len(order))]
    return tensor.permute(*order).contiguous().permute(*inverse)


def _window(tensor: Tensor, order: Sequence[int], step: int) -> Tensor:
    order = list(order)
    sizes = [step * tensor.shape[dim] + 3 for dim in order]
    storage = _poisoned(tensor, sizes)
    window = storage[tuple(slice(1, 1 + step * tensor.shape[dim], step) for dim in order)]
    inverse = [order.index(dim) for dim in range(len(order))]
    return window.permute(*inverse).copy_(tensor)


def _poisoned(like: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.full(tuple(sizes), float("nan"), dtype=like.dtype, device=like.device)


def moved(tensor: Tensor, device: str, storages: dict[int, Tensor] | None = None) -> Tensor:
    """The tensor on `device`, laid out and surrounded as here: `Tensor.to` makes views dense and aligned.

    Tensors that are moved with the same `storages` go on sharing memory where they do.
    """
    storage = tensor.untyped_storage()
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage).to(device)
    if storages is not None:
        whole = storages.setdefault(storage.data_ptr(), whole)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Surroundings:
    """What lies around a view and between its elements, as it is now."""

    def __init__(self, view: Tensor) -> None:
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[view.element_size()]
        self.whole = (
            torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage()).view(bits)
        )
        self.outside = torch.ones(self.whole.shape, dtype=torch.bool, device=view.device)
        self.outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        self.before = self.whole[self.outside]

    def are_untouched(self) -> bool:
        return torch.equal(self.whole[self.outside], self.before)
