"""The networks of torchvision and timm, fused and judged: python -m tests.zoo.

`networks.txt` names them; `catalogue` builds them, `calibrate` gives them statistics under which whatever is
dropped shows, `dataflow` counts what there is to fuse without asking the fuser, `compare` holds two outputs
against each other, `spoil` drops things on purpose, `judge` puts one network through all of it, and `summary`
writes docs/zoo.md.
"""
