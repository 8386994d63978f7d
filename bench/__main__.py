"""Measurements of fused_cna: correctness and time, side by side with what PyTorch does without it."""

import sys

from bench.cli import main

sys.exit(main())
