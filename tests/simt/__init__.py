"""The CUDA kernels on a CPU: csrc/ compiled by g++ and run thread by thread: see README.md."""

from tests.simt.binding import SimulatorError
from tests.simt.conv import conv_norm_act, list_plans

NAN_SEEDS = range(0, 16, 2)
"""Some of the seeds with which shared memory holds NaN before it is written; with odd ones, large numbers."""

__all__ = ["NAN_SEEDS", "SimulatorError", "conv_norm_act", "list_plans"]
