"""Operators over ``(N, ...)`` that treat the entries of the first dimension alike: convolutions, pooling."""

from __future__ import annotations

from torch import fx

from backsketch.regions.oprules.registry import first_rows, refuse_as_parameters, rule, source
from backsketch.regions.rows import Layout
from backsketch.regions.structure import Coupled, Label, Proof, describe


def leading(proof: Proof, node: fx.Node) -> Label:
    """Operators over ``(N, ...)`` that treat the entries of the first dimension alike."""
    at = source(proof, node)[1]
    if at is None:
        return None
    if at != Layout(0):
        raise Coupled(f"{describe(node)} is not known to keep rows apart along this dimension")
    value = node.meta["val"]
    if not isinstance(value, (tuple, list)):
        return at
    return tuple(first_rows(proof, v) for v in value)


@rule("native_group_norm", "_native_batch_norm_legit_no_training", "convolution")
@rule("cudnn_batch_norm", "miopen_batch_norm", "native_batch_norm", "_native_batch_norm_legit")
@rule("_native_batch_norm_legit_functional", "_batch_norm_with_update")
@rule("_batch_norm_with_update_functional", "_convolution")
def _leading_with_parameters(proof: Proof, node: fx.Node) -> Label:
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    refuse_as_parameters(proof, node, node.args[1:])
    if "batch_norm" in name and "no_training" not in name and source(proof, node)[1]:
        training = True if "update" in name or "legit" in name else node.args[5]
        if training:
            raise Coupled(f"{describe(node)} normalises over the rows (batch statistics)")
    return leading(proof, node)


_POOLING = (
    "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices "
    "adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d "
    "upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa "
    "im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle max_pool2d"
)
rule(*_POOLING.split())(leading)
