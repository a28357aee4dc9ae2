"""Models of timm by name. Its package wants torchvision, of which a stand-in is enough for its models."""

from __future__ import annotations

import importlib.machinery
import sys
import types
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import backsketch as bs
from backsketch.nn.swap import is_swapped

NAMES = {
    "resnet18": {"drop_path_rate": 0.0},
    "convnext_atto": {},
    "efficientnet_b0": {},
    "mobilenetv3_small_050": {},
    "vit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_patch16_224": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4},
    "mixer_s32_224": {"img_size": 64},
}


class Members(type):
    """A class that has every attribute: its name, as members of an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class StandIn:
    """Finds every module of torchvision: an empty one, whose attributes are empty classes."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__version__ = "0.28.0"
        module.__getattr__ = lambda name: _nothing(module, name)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _nothing(module: types.ModuleType, name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return Members(name, (), {"__module__": module.__name__})


@pytest.fixture(scope="module")
def timm():
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    finder = None
    if find_spec("torchvision") is None:
        sys.meta_path.append(finder := StandIn())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm
    yield timm
    if finder is not None:
        sys.meta_path.remove(finder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.fast_cases("resnet18", "swin_tiny_patch4_window7_224")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_sketched_by_name_trains_and_comes_back(timm, name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **NAMES[name]).train()
    types_before = [type(m) for m in model.modules()]
    images, labels = torch.randn(2, 3, 64, 64), torch.arange(2)
    report = bs.sketch_(model, bs.Rows(keep=0.5))
    report.measure(model, images)
    assert report.arithmetic_share > 0.85, str(report)
    F.cross_entropy(model(images), labels).backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)
    model.eval()
    sketched = model(images)
    bs.restore_(model)
    assert torch.equal(sketched, model(images))
    assert [type(m) for m in model.modules()] == types_before
    assert not any(map(is_swapped, model.modules()))
    assert isinstance(model, nn.Module)
