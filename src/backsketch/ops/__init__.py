"""Functional layers with a sketched backward pass."""

from backsketch.ops.activation import activation as activation
from backsketch.ops.attention import attention as attention
from backsketch.ops.convolution import conv1d as conv1d
from backsketch.ops.convolution import conv2d as conv2d
from backsketch.ops.convolution import conv3d as conv3d
from backsketch.ops.convolution import conv_transpose as conv_transpose
from backsketch.ops.cross_entropy import linear_cross_entropy as linear_cross_entropy
from backsketch.ops.linear import grouped_linear as grouped_linear
from backsketch.ops.linear import linear as linear
from backsketch.ops.linear import transposed_linear as transposed_linear
from backsketch.ops.norm import batch_norm as batch_norm
from backsketch.ops.norm import group_norm as group_norm
from backsketch.ops.norm import layer_norm as layer_norm
from backsketch.ops.norm import rms_norm as rms_norm
