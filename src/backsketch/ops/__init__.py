"""Functional layers with a sketched backward pass."""

from backsketch.ops.activation import activation as activation
from backsketch.ops.attention import attention as attention
from backsketch.ops.conv2d import conv2d as conv2d
from backsketch.ops.cross_entropy import linear_cross_entropy as linear_cross_entropy
from backsketch.ops.linear import linear as linear
from backsketch.ops.norm import batch_norm as batch_norm
from backsketch.ops.norm import group_norm as group_norm
from backsketch.ops.norm import layer_norm as layer_norm
from backsketch.ops.norm import rms_norm as rms_norm
