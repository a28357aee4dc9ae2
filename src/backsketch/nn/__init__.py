"""Swap classes and adapters, one file a kind of layer, registered by module type."""

from backsketch.nn import activation as activation
from backsketch.nn import attention as attention
from backsketch.nn import convolution as convolution
from backsketch.nn import dot_product as dot_product
from backsketch.nn import experts as experts
from backsketch.nn import linear as linear
from backsketch.nn import linear_cross_entropy as linear_cross_entropy
from backsketch.nn import norm as norm
from backsketch.nn import transposed_linear as transposed_linear
from backsketch.nn import without as without
from backsketch.nn.dot_product import DotProductAttention as DotProductAttention
from backsketch.nn.linear_cross_entropy import LinearCrossEntropy as LinearCrossEntropy
from backsketch.nn.registry import Adapter as Adapter
from backsketch.nn.registry import adapter_of as adapter_of
from backsketch.nn.registry import refusal as refusal
from backsketch.nn.swap import exact as exact
