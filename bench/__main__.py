"""Measurements of fused_cna: correctness and time, side by side with what PyTorch does without it."""

import signal
import sys

from bench.cli import main

# A shell lets what it runs in the background ignore interrupts, and so would the bench.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
