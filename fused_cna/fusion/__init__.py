"""Whole networks made of ``ConvNormAct``."""
