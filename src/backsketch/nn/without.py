"""Layers with weights of their own that no layer sketch can act on, and why."""

from __future__ import annotations

from torch import nn

from backsketch.nn.registry import register_reason

_RECURRENT = "its steps run in one fused call, which shows no cotangents; put a region around it"

register_reason(nn.Bilinear, "its product is trilinear, in two inputs and the weight; use a region")
register_reason(nn.RNNBase, _RECURRENT)
