"""Measurements of fused_cna: correctness and time, side by side with what PyTorch does without it."""
