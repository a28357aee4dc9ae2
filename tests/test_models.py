"""The reference models: shapes, receptive fields, branches, options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backsketch import models

CASES = [
    ("mlp", (1, 8, 8), {}),
    ("mlp", (3, 32, 32), {"widths": (64, 32)}),
    ("bagnet", (1, 8, 8), {}),
    ("bagnet", (1, 28, 28), {}),
    ("bagnet", (3, 32, 32), {"receptive_field": 9}),
    ("vit", (1, 8, 8), {}),
    ("vit", (1, 28, 28), {}),
    ("vit", (3, 32, 32), {"dim": 64, "depth": 2, "patch": 4}),
]


@pytest.mark.parametrize(("name", "shape", "overrides"), CASES)
def test_logits_have_one_row_per_image_and_every_parameter_learns(name, shape, overrides):
    model = models.build(name, shape, 7, **overrides)
    logits = model(torch.randn(3, *shape))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("receptive_field", [9, 17, 33])
def test_bagnet_sees_exactly_its_receptive_field(receptive_field):
    torch.manual_seed(0)
    model = models.bagnet(2, receptive_field=receptive_field, width=8, depths=(1, 1, 1, 1)).eval()
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    features = model.features(image)
    features[0, :, 1, 1].sum().backward()
    seen = image.grad[0].abs().sum(0) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    assert len(rows) <= receptive_field
    assert rows.max() - rows.min() + 1 == receptive_field
    assert columns.max() - columns.min() + 1 == receptive_field
    assert rows.min() == 8  # one step of the four strides 2, 2, 2, 1


def test_bagnet_defaults_are_the_architecture_of_the_paper():
    model = models.bagnet(1000)
    assert [len(stage) for stage in model.stages] == [3, 4, 6, 3]
    assert model.head.in_features == 2048
    # Counted in the authors' own PyTorch code.
    assert sum(p.numel() for p in model.parameters()) == 18_310_184


def test_bagnet_convolutions_are_pointwise_but_one_per_stage():
    model = models.build("bagnet", (3, 32, 32), 10)
    kernels = [m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert kernels.count((3, 3)) == 4  # the stem and three stages: receptive field 17
    assert set(kernels) == {(1, 1), (3, 3)}


def test_bagnet_output_is_the_mean_of_the_patch_logits():
    model = models.build("bagnet", (3, 32, 32), 10).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), model.patch_logits(images).mean((1, 2)))


def test_vit_default_and_larger_size():
    small = models.build("vit", (3, 32, 32), 10)
    assert (small.position.shape[1:], len(small.blocks)) == ((16, 96), 4)
    large = models.build("vit", (3, 32, 32), 10, dim=192, depth=6, patch=4)
    assert (large.position.shape[1:], len(large.blocks)) == ((64, 192), 6)


def test_vit_patches_are_the_pixels_of_the_image():
    model = models.vit((1, 4, 4), 2, patch=2, dim=32, depth=1)
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert model.patches(image)[0].tolist() == [
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15],
    ]  # fmt: skip


def test_vit_branches_are_whole_modules():
    model = models.build("vit", (3, 32, 32), 10)
    x = torch.randn(2, 16, 96)
    block = model.blocks[0]
    after_attention = x + block.attn(x)
    torch.testing.assert_close(block(x), after_attention + block.mlp(after_attention))
    names = {name for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    assert names == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}


def test_vit_mlp_branch_treats_tokens_independently():
    branch = models.build("vit", (3, 32, 32), 10).blocks[0].mlp
    x = torch.randn(2, 16, 96)
    torch.testing.assert_close(branch(x)[:, 3:5], branch(x[:, 3:5]))


@pytest.mark.parametrize(
    ("name", "shape", "overrides", "message"),
    [
        ("resnet", (3, 32, 32), {}, "no model named 'resnet'; there are mlp, bagnet, vit"),
        ("mlp", (3, 32, 32), {"patch": 4}, "no option 'patch'; it has widths"),
        ("mlp", (3, 32, 32), {"widths": (0,)}, "must be positive"),
        ("vit", (3, 32, 32), {"patch": 5}, "not a whole number of 5x5 patches"),
        ("vit", (3, 32, 32), {"dim": 100, "heads": 3}, "not a multiple of the 3 heads"),
        ("vit", (3, 32, 32), {"heads": 0}, "must be positive"),
        ("bagnet", (3, 32, 32), {"receptive_field": 33}, "does not fit"),
        ("bagnet", (3, 32, 32), {"receptive_field": 10}, "one of 5, 9, 17, 33"),
        ("bagnet", (3, 32, 32), {"receptive_field": 17, "depths": (1, 1)}, "at least 3 stages"),
    ],
)
def test_what_does_not_fit_is_refused(name, shape, overrides, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, shape, 10, **overrides)
