"""``FrozenConv``, a convolution with its norm folded in, and the layout and memory of a graph of such."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._prims_common import make_contiguous_strides_for, suggest_memory_format
from torch.fx import Node

from fused_cna import activation, eager, layers, ops
from fused_cna._checks import explicit_padding, output_size, pair
from fused_cna.fusion.groups import RESIDUAL_FIRST
from fused_cna.fusion.nodes import Act, Add, Norm, Pad, call_of
from fused_cna.modules import ConvNormAct

# The attribute, scalars and algorithm by which oneDNN's operators know an activation. The others of
# activation.ACTIVATIONS run after the convolution, in its memory.
_ONEDNN_ACTIVATIONS: dict[str, tuple[str, tuple[float, ...], str]] = {
    "identity": ("none", (), ""),
    "relu": ("relu", (), ""),
    "relu6": ("hardtanh", (0.0, 6.0), ""),
    "leaky_relu": ("leaky_relu", (), ""),
    "silu": ("swish", (), ""),
    "gelu": ("gelu", (), "none"),
    "gelu_tanh": ("gelu", (), "tanh"),
    "hardswish": ("hardswish", (), ""),
    "hardsigmoid": ("hardsigmoid", (), ""),
    "sigmoid": ("sigmoid", (), ""),
    "tanh": ("tanh", (), ""),
}

# A weight packed for another shape of input is right, but repacked inside every call, which costs more than
# the convolution. Shapes that want the same layout share one.
_MOST_SHAPES = 16

_onednn_dtypes: tuple[torch.dtype, ...] = ()
if torch.backends.mkldnn.is_available():
    _convolution = torch.ops.mkldnn._convolution_pointwise.default
    _convolution_add = torch.ops.mkldnn._convolution_pointwise.binary
    _convolution_add_ = torch.ops.mkldnn._convolution_pointwise_.binary
    _reorder = torch.ops.mkldnn._reorder_convolution_weight.default
    _layout = torch.ops.mkldnn._get_mkldnn_serialized_md.default
    _onednn_dtypes += (torch.float32,)
    _onednn_dtypes += (torch.bfloat16,) * torch.ops.mkldnn._is_mkldnn_bf16_supported()
    _onednn_dtypes += (torch.float16,) * torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _takes_onednn(dtype: torch.dtype, *tensors: Any) -> bool:
    """Whether oneDNN's own operators may have the tensors, which know no derivative, transform or autocast.

    Nor do they know subclasses of tensors, among them the fake ones of a compiler.
    """
    grad = torch.is_grad_enabled()
    for x in tensors:
        if type(x) is not Tensor or x.dtype is not dtype or not x.is_cpu or (grad and x.requires_grad):
            return False
    return eager.is_plain_call() and torch._C._get_mkldnn_enabled() and not torch.is_autocast_enabled("cpu")


def _convolve(convolution: tuple[Any, ...], act: str, act_params: Sequence[float]) -> Tensor:
    known = _ONEDNN_ACTIVATIONS.get(act)
    if known is None:
        return activation.apply(_convolution(*convolution, "none", (), ""), act, act_params, inplace=True)
    name, scalars, algorithm = known
    return _convolution(*convolution, name, scalars or act_params, algorithm)


def fold(weight: Tensor, bias: Tensor | None, vectors: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The weight and bias of the one convolution that equals a convolution and the batch norm behind it.

    Computed in float64 and rounded once, to the dtype of ``weight``; copies, the weight in channels_last.
    ``vectors`` are norm_weight, norm_bias, running_mean, running_var, each [K] or None, and eps.
    """
    norm_weight, norm_bias, mean, var, eps = vectors
    # An inference tensor could not be saved for the gradient of x later.
    with torch.inference_mode(False), torch.no_grad():
        folded = weight.double()
        shift = folded.new_zeros(weight.shape[0]) if bias is None else bias.double()
        if mean is not None:
            scale = (var.double() + eps).rsqrt() * (1 if norm_weight is None else norm_weight.double())
            folded = folded * scale[:, None, None, None]
            shift = (shift - mean.double()) * scale + (0 if norm_bias is None else norm_bias.double())
        # A 1x1 weight counts as channels_last already and would keep its strides, which decide those of y.
        dense = torch.empty_like(folded, dtype=weight.dtype, memory_format=torch.channels_last)
        return dense.copy_(folded), shift.to(weight.dtype, copy=True)


class FrozenConv(nn.Module):
    """What a ``ConvNormAct`` computes in eval mode, with its parameters as they were: a snapshot.

    Equivalent to::

        weight, bias = fold(block.conv.weight, block.conv.bias, vectors of block.norm)
        y = block.act(F.conv2d(x, weight, bias, ...))

    with the residual as the block adds it; one of another shape or dtype broadcasts and promotes. On a CPU it
    is one oneDNN call with a weight that is packed at the first one, and ``y`` is in channels_last. On a GPU,
    where oneDNN has no such call, the gradient of ``x`` is wanted, autocast is on, or a compiler or another
    transform looks on, it is :func:`fused_cna.conv_norm_act` on the folded weight.

    oneDNN's ReLU, ReLU6 and Hardsigmoid turn NaN into numbers, where PyTorch's keep it. It has no buffers: to
    be moved, cast or copied it is made anew.

    Shape:
        x: [N, C, H, W] or [C, H, W]. residual and result: [N, K, P, Q] or [K, P, Q].
    """

    overwrites_residual = False
    """Whether the sum may be computed in the memory of the residual, which saves the memory for another."""

    def __init__(
        self, conv: Any, vectors: Sequence[Any], act: tuple[str, tuple[float, ...]], order: str
    ) -> None:
        super().__init__()
        self.weight, self.bias = fold(conv.weight, conv.bias, vectors)
        self.channels_last = suggest_memory_format(conv.weight) is torch.channels_last
        self.act, self.residual_order, self.pads_same = act, order, layers.pads_same(conv)
        stride, dilation = pair(conv.stride, "stride"), pair(conv.dilation, "dilation")
        padding = explicit_padding(conv.padding, self.weight.shape[2:], stride, dilation)
        # What F.pad does to x first: borders that are no zeros, or not the same on both sides.
        self.borders: list[tuple[tuple[int, ...], str]] = []
        if conv.padding_mode != "zeros":
            padding = (0, 0)
            self.borders = [(tuple(conv._reversed_padding_repeated_twice), conv.padding_mode)]
        elif len(padding) == 4:
            top, bottom, left, right = padding
            height, width = padding = (min(top, bottom), min(left, right))
            self.borders = [((left - width, right - width, top - height, bottom - height), "constant")]
        # In the order of oneDNN's operators.
        self.geometry = {"padding": padding, "stride": stride, "dilation": dilation, "groups": conv.groups}
        self._packed: dict[torch.Size, Tensor] = {}
        self.eval()

    @classmethod
    def from_block(cls, block: ConvNormAct) -> "FrozenConv":
        """The snapshot of a block, which shares no tensor with it.

        Raises:
            ValueError: the block computes something else than a convolution, a norm by running statistics and
                an activation that is known.
        """
        conv, norm, act = (block._modules[name] or nn.Identity().eval() for name in ("conv", "norm", "act"))
        vectors, known, order = layers.epilogue(norm, act, block.residual_order) or ((), None, "")
        is_other = block.training or norm.training or any(map(layers.has_hooks, block.modules()))
        if known is None or is_other or not layers.is_conv(conv):
            raise ValueError(
                "cannot freeze this ConvNormAct: it has to be in eval mode and without hooks, its conv an "
                "nn.Conv2d, its norm a batch norm with running statistics, and its act one of "
                f"{', '.join(activation.ACTIVATIONS)}, but it is {block}"
            )
        frozen = cls(conv, vectors, known, order)
        if any(block.zero_pad):
            top, bottom, left, right = block.zero_pad
            frozen.borders.insert(0, ((left, right, top, bottom), "constant"))
        return frozen

    def forward(self, x: Tensor, residual: Any = None) -> Tensor:
        """The block's result for its parameters as they were.

        Raises:
            RuntimeError: whatever ``F.conv2d`` refuses.
        """
        for amounts, mode in self.borders:
            x = F.pad(x, amounts, mode)
        if self.pads_same:
            sizes = self.weight.shape[2:], self.geometry["stride"], self.geometry["dilation"]
            amounts = layers.same_padding(x.shape[-2:], *sizes)
            x = F.pad(x, (*amounts[2:], *amounts[:2])) if any(amounts) else x
        if residual is None or (
            isinstance(residual, Tensor) and eager.is_summand(residual, x, self._shape(x))
        ):
            return self._run(x, residual, *self.act)
        if self.residual_order == "act_add":
            return self._run(x, None, *self.act) + residual
        return activation.apply(self._run(x, None, "identity", ()) + residual, *self.act)

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the result for an ``x`` with its borders."""
        padding, stride, dilation, _ = self.geometry.values()
        size = output_size(x.shape[-2:], self.weight.shape[2:], stride, padding, dilation)
        return *x.shape[:-3], self.weight.shape[0], *size

    def _run(self, x: Tensor, residual: Tensor | None, act: str, act_params: Sequence[float]) -> Tensor:
        tensors = (x, self.weight) if residual is None else (x, self.weight, residual)
        if _takes_onednn(self.weight.dtype, *tensors) and (weight := self._packed_weight(x)) is not None:
            return self._run_onednn(
                (x, weight, self.bias, *self.geometry.values()), residual, act, act_params
            )
        options: Any = {"act": act, "act_params": act_params, **self.geometry}
        options.update(residual=residual, residual_order=self.residual_order)
        if isinstance(x, Tensor) and (x.is_cuda or ops.operator_everywhere):
            return ops.conv_norm_act(x, self.weight, self.bias, **options)
        return eager.conv_norm_act(x, self.weight, self.bias, *layers.NO_NORM, **options)

    def _packed_weight(self, x: Tensor) -> Tensor | None:
        """The weight packed for the shape of ``x``; None where oneDNN does not take the two.

        Threads may pack the same at once: what they share is replaced whole, never written to.
        """
        packed, weight = self._packed, self.weight
        if x.shape in packed:
            return packed[x.shape]
        channels = weight.shape[1] * self.geometry["groups"]
        if x.dtype not in _onednn_dtypes or x.dim() != 4 or x.shape[1] != channels:
            return None
        if min(*x.shape, *self._shape(x)) <= 0:
            return None
        fresh = _reorder(weight, *self.geometry.values(), x.shape)
        layout = _layout(fresh)
        fresh = next((other for other in packed.values() if torch.equal(_layout(other), layout)), fresh)
        self._packed = dict([*packed.items(), (x.shape, fresh)][-_MOST_SHAPES:])
        return fresh

    def _run_onednn(
        self, convolution: tuple[Any, ...], residual: Any, act: str, act_params: Sequence[float]
    ) -> Tensor:
        if residual is None:
            return _convolve(convolution, act, act_params)
        if self.residual_order == "act_add":
            return _convolve(convolution, act, act_params).add_(residual)
        if act not in ("identity", "relu") or self.geometry["groups"] != 1:
            z = _convolve(convolution, "identity", ()).add_(residual)
            return activation.apply(z, act, act_params, inplace=True)
        post = ("add", 1.0, None if act == "identity" else act, (), "")
        if self.overwrites_residual and residual.is_contiguous(memory_format=torch.channels_last):
            return _convolution_add_(residual, *convolution, *post)
        return _convolution_add(convolution[0], residual, *convolution[1:], *post)


def _lies_in_channels_last(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4 and suggest_memory_format(x) is torch.channels_last


def _lies_as_larger(a: Any, b: Any, a_lies: bool, b_lies: bool) -> bool:
    """Whether an elementwise result of two tensors lies in channels_last, by whether they do."""
    larger = isinstance(b, Tensor) and (not isinstance(a, Tensor) or b.numel() > a.numel())
    return b_lies if larger else a_lies


def _as_plain(y: Tensor, lies: bool) -> Tensor:
    """``y`` with its elements in order in memory, unless the plain network has it in channels_last."""
    if lies or y.stride() == make_contiguous_strides_for(y.shape):
        return y
    return y.clone(memory_format=torch.contiguous_format)


# Beside activations, norms, sums and zero padding: what returns fresh memory that lies as the inputs do, what
# returns its first argument or a part of it, and what returns the same however its input lies.
_FRESH_MODULES = (FrozenConv, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.Upsample)
_FRESH = {operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.mul, "mul", torch.cat}
_FRESH |= {F.interpolate, F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d}
_ALIASES = {torch.chunk, torch.split, "chunk", "split", operator.getitem, operator.imul, "mul_"}
_BLIND = {torch.mean, "mean", "size", "dim", _lies_in_channels_last, _lies_as_larger}
_BLIND_ATTRIBUTES = ("shape", "ndim", "dtype", "device")


def _kind(node: Node, modules: dict[str, nn.Module]) -> str:
    """Whether a node is one of the above: "fresh", "alias" or "blind"; empty where it may be anything."""
    call = call_of(node, modules)
    if "out" in node.kwargs or not node.args:
        return ""
    if node.target in _BLIND or (node.target is getattr and node.args[1] in _BLIND_ATTRIBUTES):
        return "blind"
    if node.target in _ALIASES or getattr(call, "overwrites", False) or getattr(call, "overwritten", None):
        return "alias" if isinstance(node.args[0], Node) else ""
    is_fresh = isinstance(call, (Act, Add, Norm, Pad)) or node.target in _FRESH
    return "fresh" if is_fresh or _is(node, modules, _FRESH_MODULES) else ""


def _is(node: Any, modules: dict[str, nn.Module], kinds: Any) -> bool:
    return node.op == "call_module" and isinstance(modules[str(node.target)], kinds)


def keep_layout(graph_module: fx.GraphModule) -> None:
    """Let results of ``FrozenConv`` lie as the plain network's wherever it matters, in place.

    Between nodes that compute the same in any layout they stay in channels_last. All others, and the caller,
    get them as the plain network would give them: in channels_last where the weight of the convolution lay
    so, or where its input does. What shares memory in the plain network shares it here.
    """
    graph, modules = graph_module.graph, dict(graph_module.named_modules())
    # By node whose result may lie in another layout than in the plain network: the node that says which one.
    answers: dict[Node, Node] = {}
    measured: dict[Node, Node] = {}

    def answer_of(x: Node) -> Node:
        if x not in answers and x not in measured:
            following = x.next
            while following.op == "placeholder":
                following = following.next
            with graph.inserting_before(following):
                measured[x] = graph.call_function(_lies_in_channels_last, (x,))
        return answers[x] if x in answers else measured[x]

    def make_plain(x: Any, reader: Node) -> None:
        base = x
        while _kind(base, modules) == "alias":
            base = base.args[0]
        if base not in answers:
            return
        is_result = reader.op == "output" and base is x
        users = [reader] if is_result else list(base.users)
        with graph.inserting_before(reader) if is_result else graph.inserting_after(base):
            plain = graph.call_function(_as_plain, (base, answers[base]))
        for user in users:
            user.replace_input_with(base, plain)
        if not is_result:
            del answers[base]

    for node in list(graph.nodes):
        kind, inputs = _kind(node, modules), node.all_input_nodes
        if kind == "fresh" and node.target is torch.cat and len({answers.get(x, x) for x in inputs}) > 1:
            kind = ""
        if kind == "":
            for x in inputs:
                make_plain(x, node)
        elif _is(node, modules, FrozenConv):
            if node.meta.get(RESIDUAL_FIRST):
                answers[node] = answer_of(node.args[1])
            elif not modules[node.target].channels_last:
                answers[node] = answer_of(node.args[0])
        elif kind == "alias" and node.args[0] in answers:
            answers[node] = answers[node.args[0]]
        elif kind == "fresh" and not answers.keys().isdisjoint(inputs):
            answers[node] = answer_of(inputs[0])
            if len(inputs) == 2 and answer_of(inputs[1]) is not answers[node]:
                operands = (*inputs, answers[node], answer_of(inputs[1]))
                with graph.inserting_before(node):
                    answers[node] = graph.call_function(_lies_as_larger, operands)
    graph_module.recompile()


def multiply_into(x: Tensor, scale: Tensor) -> Tensor:
    """``x * scale``, in the memory of ``x`` where it fits there and nothing keeps ``x``."""
    if not isinstance(scale, Tensor) or not _takes_onednn(x.dtype, x, scale):
        return x * scale
    return x.mul_(scale) if torch.broadcast_shapes(x.shape, scale.shape) == x.shape else x * scale


def reuse_memory(graph_module: fx.GraphModule) -> None:
    """Let residual additions and multiplications overwrite what nothing reads later, in place.

    A ``FrozenConv`` overwrites its residual, and ``x * scale`` becomes :func:`multiply_into`, where the
    overwritten tensor was made by a ``FrozenConv`` and everything else that reads it runs before and returns
    no view of it. Fresh memory is dear on a CPU: the system clears every page that it hands out, which takes
    longer than a layer bound by memory.
    """
    modules: dict[str, Any] = dict(graph_module.named_modules())
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}

    def is_last_use(x: Any, node: Node) -> bool:
        if not isinstance(x, Node) or not _is(x, modules, FrozenConv) or node.args.count(x) != 1:
            return False
        before = [user for user in x.users if user is not node]
        return all(
            order[user] < order[node] and _kind(user, modules) in ("fresh", "blind") for user in before
        )

    seen: set[FrozenConv] = set()
    for node in graph_module.graph.nodes:
        if _is(node, modules, FrozenConv):
            frozen = modules[node.target]
            overwrites = frozen.overwrites_residual or frozen not in seen
            frozen.overwrites_residual = (
                overwrites and is_last_use(node.args[-1], node) and len(node.args) == 2
            )
            seen.add(frozen)
        elif node.target in (operator.mul, torch.mul) and len(node.args) == 2 and not node.kwargs:
            x = next((arg for arg in node.args if is_last_use(arg, node)), None)
            if x is not None:
                scale = node.args[1] if node.args[0] is x else node.args[0]
                node.target, node.args = multiply_into, (x, scale)
    graph_module.recompile()
