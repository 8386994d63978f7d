"""Switches of the package, read at every call: ``fused_cna.config.strict = True``."""

strict: bool = False
"""Raise a ``RuntimeError`` where a call on CUDA tensors would fall back to eager PyTorch with a warning."""


class FusionFallbackWarning(UserWarning):
    """A call on CUDA tensors runs as eager PyTorch; the message names the cause. Given once per cause."""


class PlanFileWarning(UserWarning):
    """Tuned plans are ignored, or a file of them was set aside; the message says why. Given once."""
