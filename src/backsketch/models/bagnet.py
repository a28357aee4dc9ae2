"""BagNet: a ResNet that sees small patches only (Brendel and Bethge, ICLR 2019).

Nearly all convolutions are 1x1, so the whole backward pass is linear layers over positions. One 3x3
convolution without padding opens the network and one opens each of the first stages; with the jump
(the product of the strides so far) doubling from stage to stage, the receptive field is

    3 + 2 * (1 + 2 + 4 + ...) = 5, 9, 17, 33   for 1, 2, 3, 4 such stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn import functional as F

EXPANSION = 4
# receptive field -> number of stages that open with a 3x3 convolution
STAGES_WITH_3X3 = {5: 1, 9: 2, 17: 3, 33: 4}
NORMS: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType(
    {
        "batch": nn.BatchNorm2d,
        "group": lambda channels: nn.GroupNorm(math.gcd(channels, max(channels // 8, 1)), channels),
    }
)


class Bottleneck(nn.Module):
    """`relu(shortcut(x) + branch(x))`, the shortcut cropped to what an unpadded 3x3 leaves.

    The residual branch is one submodule (`branch`), the identity path is outside it.

    Shapes: `(batch, in_channels, h, w)` to `(batch, 4 * planes, h', w')`.
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        kernel_size: int = 1,
        norm: str = "batch",
    ):
        super().__init__()
        out_channels = EXPANSION * planes
        self.branch = nn.Sequential(
            _conv(in_channels, planes),
            _norm(norm, planes),
            nn.ReLU(),
            _conv(planes, planes, kernel_size, stride),
            _norm(norm, planes),
            nn.ReLU(),
            _conv(planes, out_channels),
            _norm(norm, out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                _conv(in_channels, out_channels, stride=stride), _norm(norm, out_channels)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        return self.relu(out + _cropped(self.shortcut(x), *out.shape[-2:]))


def _cropped(x: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns.

    An index would do, but for its gradient, which is never channels last: PyTorch's batch norm takes some twenty
    times as long for a cotangent that lies in memory otherwise than its input.
    """
    below, right = x.shape[-2] - height, x.shape[-1] - width
    return F.pad(x, (0, -right, 0, -below)) if below or right else x


class BagNet(nn.Module):
    """Stem, stages of bottlenecks, average over positions, linear head.

    The head is linear and the pooling is an average, so classifying the mean of the features equals
    averaging the logits of all patches. `patch_logits` returns those.

    Shapes: input `(batch, in_channels, height, width)`, output `(batch, num_classes)`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        width: int,
        depths: Sequence[int],
        strides: Sequence[int],
        num_3x3: int,
        norm: str = "batch",
    ):
        super().__init__()
        self.stem = nn.Sequential(
            _conv(in_channels, width), _conv(width, width, 3), _norm(norm, width), nn.ReLU()
        )
        stages: list[nn.Module] = []
        channels = width
        for index, (depth, stride) in enumerate(zip(depths, strides)):
            planes = width * 2**index
            kernel_size = 3 if index < num_3x3 else 1
            first = Bottleneck(channels, planes, stride, kernel_size, norm)
            channels = EXPANSION * planes
            rest = (Bottleneck(channels, planes, norm=norm) for _ in range(depth - 1))
            stages.append(nn.Sequential(first, *rest))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """Patch features `(batch, channels, h', w')`; each sees one receptive field."""
        return self.stages(self.stem(x))

    def patch_logits(self, x: Tensor) -> Tensor:
        """Class evidence per patch, `(batch, h', w', num_classes)`; its mean is the output."""
        return self.head(self.features(x).permute(0, 2, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


def bagnet(
    num_classes: int,
    *,
    in_channels: int = 3,
    receptive_field: int = 33,
    width: int = 64,
    depths: Sequence[int] = (3, 4, 6, 3),
    strides: Sequence[int] = (2, 2, 2, 1),
    norm: str = "batch",
) -> BagNet:
    """BagNet-9/17/33; the defaults are the architecture of the paper for 224x224 images.

    Args:
        num_classes: outputs.
        in_channels: image channels.
        receptive_field: side of the patch that one output position sees: 5, 9, 17 or 33.
        width: channels of the stem; stage i has `4 * width * 2**i`.
        depths: bottlenecks per stage.
        strides: stride of each stage; all but the last must be 2 for the receptive fields above.
        norm: ``"batch"``, or ``"group"``, which does not couple samples (groups of 8 channels).

    Raises:
        ValueError: an unknown norm, an unknown receptive field, or one that needs more stages than `depths` has.

    Source: Brendel and Bethge, Approximating CNNs with bag-of-local-features models works
    surprisingly well on ImageNet, ICLR 2019, arXiv 1904.00760.

    Example:
        >>> import torch
        >>> model = bagnet(10, receptive_field=9, width=8, depths=(1, 1), strides=(2, 1))
        >>> model(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    if receptive_field not in STAGES_WITH_3X3:
        known = ", ".join(map(str, STAGES_WITH_3X3))
        raise ValueError(f"receptive_field must be one of {known}, got {receptive_field}")
    num_3x3 = STAGES_WITH_3X3[receptive_field]
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")
    if len(depths) != len(strides) or len(depths) < num_3x3:
        raise ValueError(
            f"receptive field {receptive_field} needs at least {num_3x3} stages and one stride per "
            f"stage, got depths {tuple(depths)} and strides {tuple(strides)}"
        )
    return BagNet(num_classes, in_channels, width, depths, strides, num_3x3, norm)


def bagnet_for_images(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    receptive_field: int | None = None,
    width: int | None = None,
    depths: Sequence[int] | None = None,
    norm: str = "batch",
) -> BagNet:
    """The variant for a size: the paper's from 64 pixels on, else three narrow stages.

    The small variant (width 32, depths 2, 2, 2, strides 2, 2, 1) takes 32x32 images at receptive
    field 17, and trains on a CPU.

    Raises:
        ValueError: the receptive field does not fit in the image.
    """
    in_channels, height, width_px = image_shape
    side = min(height, width_px)
    large = side >= 64
    if receptive_field is None:
        receptive_field = 33 if large else max((f for f in (5, 9, 17) if f <= side), default=5)
    if receptive_field > side:
        raise ValueError(
            f"receptive field {receptive_field} does not fit in {height}x{width_px} images"
        )
    stages = max(3, STAGES_WITH_3X3.get(receptive_field, 0))
    depths = depths or ((3, 4, 6, 3) if large else (2,) * stages)
    return bagnet(
        num_classes,
        in_channels=in_channels,
        receptive_field=receptive_field,
        width=width or (64 if large else 32),
        depths=depths,
        strides=(2,) * (len(depths) - 1) + (1,),
        norm=norm,
    )


def _norm(name: str, channels: int) -> nn.Module:
    return NORMS[name](channels)


def _conv(in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, bias=False)
