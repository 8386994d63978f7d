"""Whole networks: which convolutions are fused with what follows them, and the networks that run so."""
