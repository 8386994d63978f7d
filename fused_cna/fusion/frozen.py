"""``FrozenConv``, a convolution with its norm folded in, and the layout and memory of a graph of such."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._prims_common import make_contiguous_strides_for, suggest_memory_format
from torch.fx import Node

from fused_cna import activation, eager, functional, layers
from fused_cna._checks import explicit_padding, output_shape, pair
from fused_cna.fusion.aliasing import KEEPING_LAYOUT
from fused_cna.fusion.groups import RESIDUAL_FIRST
from fused_cna.fusion.nodes import Act, Add, Norm, Pad, call_of
from fused_cna.modules import ConvNormAct

# The attribute, scalars and algorithm by which oneDNN's operators know an activation. The others of
# activation.ACTIVATIONS run after the convolution, in its memory.
_SAME_NAMES = ("relu", "leaky_relu", "hardswish", "hardsigmoid", "sigmoid", "tanh")
_ONEDNN_ACTS: dict[str, tuple[str, Sequence[float], str]] = {name: (name, (), "") for name in _SAME_NAMES}
_ONEDNN_ACTS |= {
    "identity": ("none", (), ""),
    "silu": ("swish", (), ""),
    "relu6": ("hardtanh", (0.0, 6.0), ""),
}
_ONEDNN_ACTS |= {"gelu": ("gelu", (), "none"), "gelu_tanh": ("gelu", (), "tanh")}

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
    is one oneDNN call with a weight that is packed at the first one, and ``y`` is in channels_last; its ReLU,
    ReLU6 and Hardsigmoid turn NaN into numbers. On a GPU, and wherever oneDNN may not run, it is
    :func:`fused_cna.conv_norm_act`. It has no buffers: to be moved, cast or copied it is made anew.

    Shape:
        x: [N, C, H, W] or [C, H, W]. residual and result: [N, K, P, Q] or [K, P, Q].
    """

    def __init__(self, block: ConvNormAct) -> None:
        """Take the snapshot of a block, which shares no tensor with it.

        Raises:
            ValueError: the block computes something else than can be fused.
        """
        super().__init__()
        conv: Any
        conv, norm, act = (block._modules[name] or nn.Identity().eval() for name in ("conv", "norm", "act"))
        vectors, known, order = layers.epilogue(norm, act, block.residual_order) or ((), None, "")
        is_other = block.training or norm.training or any(map(layers.has_hooks, block.modules()))
        if known is None or is_other or not layers.is_conv(conv):
            raise ValueError(
                "cannot freeze this ConvNormAct: it has to be in eval mode and without hooks, its conv an "
                "nn.Conv2d, its norm a batch norm with running statistics, and its act one of "
                f"{', '.join(activation.ACTIVATIONS)}, but it is {block}"
            )
        self.weight, self.bias = fold(conv.weight, conv.bias, vectors)
        self.channels_last = suggest_memory_format(conv.weight) is torch.channels_last
        self.act, self.residual_order, self.pads_same = known, order, layers.pads_same(conv)
        stride, dilation = pair(conv.stride, "stride"), pair(conv.dilation, "dilation")
        padding = explicit_padding(conv.padding, self.weight.shape[2:], stride, dilation)
        # What F.pad does to x first: the block's zeros, borders of other values, or of several widths.
        top, bottom, left, right = block.zero_pad
        self.borders = [((left, right, top, bottom), "constant")] if any(block.zero_pad) else []
        if conv.padding_mode != "zeros":
            self.borders += [(tuple(conv._reversed_padding_repeated_twice), conv.padding_mode)]
            padding = (0, 0)
        elif len(padding) == 4:
            self.borders += [((*padding[2:], *padding[:2]), "constant")]
            padding = (0, 0)
        # In the order of oneDNN's operators.
        self.geometry = {"padding": padding, "stride": stride, "dilation": dilation, "groups": conv.groups}
        self._packed: dict[torch.Size, Tensor] = {}
        self.eval()

    def forward(self, x: Tensor, residual: Any = None, overwrites_residual: bool = False) -> Tensor:
        """The block's result for its parameters as they were; it may take the memory of the residual.

        Raises:
            RuntimeError: whatever ``F.conv2d`` refuses.
        """
        for amounts, mode in self.borders:
            x = F.pad(x, amounts, mode)
        if self.pads_same:
            sizes = self.weight.shape[2:], self.geometry["stride"], self.geometry["dilation"]
            amounts = layers.same_padding(x.shape[-2:], *sizes)
            x = F.pad(x, (*amounts[2:], *amounts[:2])) if any(amounts) else x
        is_tensor = isinstance(residual, Tensor)
        if residual is None or (is_tensor and eager.is_summand(residual, x, self._shape(x))):
            return self._run(x, residual, *self.act, overwrites_residual)
        if self.residual_order == "act_add":
            return self._run(x, None, *self.act) + residual
        return activation.apply(self._run(x, None, "identity", ()) + residual, *self.act)

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the result for an ``x`` with its borders."""
        padding, stride, dilation, _ = self.geometry.values()
        return output_shape(x.shape, self.weight.shape, stride, padding, dilation)

    def _run(
        self, x: Tensor, residual: Any, act: str, params: Sequence[float], overwrites: bool = False
    ) -> Tensor:
        adds_first = residual is not None and self.residual_order == "add_act"
        if (weight := self._packed_weight(x, residual)) is None:
            options: Any = {"residual": residual, "residual_order": self.residual_order, **self.geometry}
            return functional.conv_norm_act(x, self.weight, self.bias, act=act, act_params=params, **options)
        conv = (x, weight, self.bias, *self.geometry.values())
        if adds_first and act in ("identity", "relu") and self.geometry["groups"] == 1:
            post = ("add", 1.0, None if act == "identity" else act, (), "")
            if overwrites and residual.is_contiguous(memory_format=torch.channels_last):
                return _convolution_add_(residual, *conv, *post)
            return _convolution_add(x, residual, *conv[1:], *post)
        known = None if adds_first else _ONEDNN_ACTS.get(act)
        name, scalars, algorithm = known or _ONEDNN_ACTS["identity"]
        y = _convolution(*conv, name, scalars or (params if known else ()), algorithm)
        y = y.add_(residual) if adds_first else y
        y = y if known else activation.apply(y, act, params, inplace=True)
        return y if residual is None or adds_first else y.add_(residual)

    def _packed_weight(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """The weight packed for the shape of ``x``; None where oneDNN does not take the call.

        Its operators know no derivative, transform, autocast or subclass, such as the tensors of a compiler.
        Threads may pack the same at once: what they share is replaced whole, never written to.
        """
        packed, weight, grad = self._packed, self.weight, torch.is_grad_enabled()
        for one in (x, weight) if residual is None else (x, weight, residual):
            is_plain = type(one) is Tensor and one.dtype is weight.dtype and one.is_cpu
            if not is_plain or (grad and one.requires_grad):
                return None
        if (
            not eager.is_plain_call()
            or not torch._C._get_mkldnn_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        if x.shape in packed:
            return packed[x.shape]
        fits = x.dim() == 4 and x.shape[1] == weight.shape[1] * self.geometry["groups"]
        if x.dtype not in _onednn_dtypes or not fits or min(*x.shape, *self._shape(x)) <= 0:
            return None
        fresh = _reorder(weight, *self.geometry.values(), x.shape)
        layout = _layout(fresh)
        fresh = next((other for other in packed.values() if torch.equal(_layout(other), layout)), fresh)
        self._packed = dict([*packed.items(), (x.shape, fresh)][-_MOST_SHAPES:])
        return fresh


def _lies_in_channels_last(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4 and suggest_memory_format(x) is torch.channels_last


def _as_plain(y: Tensor, lies: bool) -> Tensor:
    """``y`` with its elements in order in memory, unless the plain network has it in channels_last."""
    if lies or y.stride() == make_contiguous_strides_for(y.shape):
        return y
    return y.clone(memory_format=torch.contiguous_format)


# What returns its first argument or a part of it, and what returns the same however its input lies.
_ALIASES = {torch.chunk, torch.split, "chunk", "split", operator.getitem, operator.imul, "mul_"}
_BLIND = {"size", "dim", _lies_in_channels_last}
_BLIND_ATTRIBUTES = ("shape", "ndim", "dtype", "device")


def _kind(node: Any, modules: dict[str, nn.Module]) -> str:
    """What a node is: "frozen", "fresh", "alias" or "blind"; empty where it may be anything."""
    if not isinstance(node, Node) or "out" in node.kwargs or not node.args:
        return ""
    call, what = call_of(node, modules), node.target
    what = type(modules[str(what)]) if node.op == "call_module" else what
    if what in _BLIND or (what is getattr and node.args[1] in _BLIND_ATTRIBUTES):
        return "blind"
    if what in _ALIASES or getattr(call, "overwritten", None):
        return "alias" if isinstance(node.args[0], Node) else ""
    is_fresh = isinstance(call, (Act, Add, Norm, Pad)) or what in KEEPING_LAYOUT
    return "frozen" if what is FrozenConv else "fresh" if is_fresh else ""


def keep_layout(graph_module: fx.GraphModule) -> None:
    """Let results of ``FrozenConv`` lie as the plain network's wherever it matters, in place.

    Between nodes that compute the same in any layout they stay in channels_last. All others, and the caller,
    get them as the plain network would give them: in channels_last where the weight of the convolution lay
    so, or where its input does. What shares memory in the plain network shares it here.
    """
    graph, modules = graph_module.graph, dict(graph_module.named_modules())
    # By node whose result may lie otherwise than in the plain network: the node that says how it lies there.
    answers: dict[Node, Node] = {}

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
        kind, source = _kind(node, modules), None
        if kind == "":
            for x in node.all_input_nodes:
                make_plain(x, node)
        elif kind == "frozen" and node.meta.get(RESIDUAL_FIRST):
            source = node.args[1]
        elif kind == "frozen":
            source = None if modules[str(node.target)].channels_last else node.args[0]
        elif kind != "blind":
            source = next((x for x in node.all_input_nodes if x in answers), None)
        if source is not None:
            with graph.inserting_before(node):
                answer = answers.get(source) or graph.call_function(_lies_in_channels_last, (source,))
            answers[node] = answer
    graph_module.recompile()


def reuse_memory(graph_module: fx.GraphModule) -> None:
    """Let a ``FrozenConv`` overwrite its residual where nothing reads that later, in place.

    Another has made it, and everything else that reads it runs before and returns no view of it. Fresh memory
    is dear on a CPU: the system clears every page that it hands out.
    """
    modules = dict(graph_module.named_modules())

    def is_harmless(user: Node, node: Node) -> bool:
        return user is node or (user < node and _kind(user, modules) not in ("", "alias"))

    for node in graph_module.graph.nodes:
        x, *residual = node.args if _kind(node, modules) == "frozen" else (None,)
        for one in residual:
            if (
                one is not x
                and _kind(one, modules) == "frozen"
                and all(is_harmless(u, node) for u in one.users)
            ):
                node.kwargs = {"overwrites_residual": True}
    graph_module.recompile()
