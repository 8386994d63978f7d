"""A batch run through a graph in parts, so that what lies between two layers stays in memory at hand."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_cna.activation import ACTIVATIONS
from fused_cna.fusion.cpu_memory import multiply_into
from fused_cna.fusion.frozen import FrozenConv, is_plain, is_plain_call

# What the largest tensor of a part may take for each thread. Above about 32 MB the C library hands every
# tensor out as fresh pages and returns them at once.
_BYTES_PER_THREAD = 10 << 20

_MODULES = (
    FrozenConv,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.BatchNorm2d,
    nn.Conv2d,
    nn.Dropout,
    nn.Linear,
    nn.MaxPool2d,
    *{row.module for row in ACTIVATIONS.values()},
)
_MODULES_BY_NAME = {
    "timm.layers.drop.DropPath",
    "torchvision.ops.stochastic_depth.StochasticDepth",
}
_FUNCTIONS = {
    *(row.function for row in ACTIVATIONS.values()),
    F.adaptive_avg_pool2d,
    F.avg_pool2d,
    F.hardsigmoid,
    F.max_pool2d,
    F.relu,
    F.sigmoid,
    F.silu,
    torch.relu,
    torch.sigmoid,
}
_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_"}
_SUMS_AND_PRODUCTS = {operator.add, operator.iadd, operator.mul, torch.add, torch.mul, multiply_into}


class _Survey(fx.Interpreter):
    """One run without data, which sees whether every image goes its own way and what the images take."""

    def __init__(self, graph_module: fx.GraphModule, images: int) -> None:
        super().__init__(graph_module)
        self.images = images
        self.independent = True
        self.largest = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "output":
            self.independent &= isinstance(result, Tensor)
            return result
        self.independent &= (
            isinstance(result, Tensor)
            and result.dim() > 1
            and result.shape[0] == self.images
            and _keeps_images_apart(n, dict(self.module.named_modules()))  # type: ignore[union-attr]
        )
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel() * result.element_size())
            n.meta["dimensions"] = result.dim()
        return result


def _keeps_images_apart(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether an operation on tensors that hold one image per first index gives another such tensor."""
    if node.op == "placeholder":
        return True
    if node.op == "call_module":
        module = modules[str(node.target)]
        kind = type(module)
        known = kind in _MODULES or f"{kind.__module__}.{kind.__qualname__}" in _MODULES_BY_NAME
        return known and not module.training
    if node.op == "call_function" and node.target in _SUMS_AND_PRODUCTS:
        return len({arg.meta["dimensions"] for arg in node.all_input_nodes}) == 1
    if node.op == "call_function" and node.target in (torch.cat, torch.concat):
        return (node.args[1:] or (node.kwargs.get("dim"),)) == (1,)
    if (node.op == "call_function" and node.target is torch.flatten) or node.target == "flatten":
        return (node.args[1:] or (node.kwargs.get("start_dim"),)) == (1,)
    if (node.op == "call_function" and node.target is torch.mean) or node.target == "mean":
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return dims in ([2, 3], (2, 3), [-2, -1], (-2, -1), [-1, -2], (-1, -2))
    if node.op == "call_method":
        return node.target in _METHODS
    return node.op == "call_function" and node.target in _FUNCTIONS


def images_per_part(graph_module: fx.GraphModule, x: Tensor) -> int:
    """How many images to run at a time through a graph with one input and one output.

    Args:
        graph_module: from a tensor with one image per first index to another.
        x: [N, C, H, W].

    Returns:
        N where the graph may mix images, or all of them together are small; else less, for parts of about
        the same size.
    """
    images = x.shape[0]
    survey = _Survey(graph_module, images)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        survey.run(mode.from_tensor(x))
    most = _BYTES_PER_THREAD * torch.get_num_threads() * images // max(survey.largest, 1)
    if not survey.independent or most >= images:
        return images
    parts = -(-images // max(most, 1))
    return -(-images // parts)


class InParts(nn.Module):
    """A graph of ``FrozenConv`` that runs a large batch in parts.

    Equivalent to ``graph_module(x)``. The results are those of the parts, whose layers may sum in another
    order than those of the whole batch.
    """

    _MOST_SHAPES = 64

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module
        self._images_per_part: dict[tuple[torch.Size, torch.dtype, int], int] = {}

    def forward(self, x: Tensor) -> Tensor:
        if not (is_plain_call() and is_plain(x, x.dtype) and x.dim() == 4 and x.shape[0] > 1):
            return self.graph_module(x)
        key = (x.shape, x.dtype, torch.get_num_threads())
        images = self._images_per_part.get(key)
        if images is None:
            images = images_per_part(self.graph_module, x)
            known = list(self._images_per_part.items())[-(self._MOST_SHAPES - 1) :]
            self._images_per_part = {**dict(known), key: images}
        if images == x.shape[0]:
            return self.graph_module(x)
        return torch.cat([self.graph_module(part) for part in x.split(images)])
