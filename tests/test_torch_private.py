"""Private interfaces of PyTorch are used in one module, and each has a fallback that works."""

from __future__ import annotations

import ast
from pathlib import Path

import torch
from torch import nn

import backsketch as bs
from backsketch import torch_private
from backsketch.regions import state_of

SOURCE = Path(bs.__file__).parent
COMPILER = ("functorch.compile", "torch._dynamo", "torch._inductor", "torch._functorch")


def private_names(path: Path) -> set[str]:
    """Dotted names below ``torch`` with a leading underscore, and imports of the compiler."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            inside = name.startswith(("torch.", "functorch."))
            dunder = name.endswith("__")
            if inside and not dunder and ("._" in name or name.startswith(COMPILER)):
                found.add(name)
    return found


def test_private_names_are_used_in_one_module() -> None:
    users = {p.relative_to(SOURCE).as_posix(): private_names(p) for p in SOURCE.rglob("*.py")}
    assert users.pop("torch_private.py")
    assert not {name: found for name, found in users.items() if found}


def test_without_dynamos_entries_regions_take_the_long_way(monkeypatch) -> None:
    from torch._dynamo import eval_frame

    monkeypatch.delattr(eval_frame, "_debug_get_cache_entry_list")
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(6, 4)
    bs.sketch_(model, bs.Region(keep=0.5))
    for _ in range(3):
        model(x).square().sum().backward()
    assert state_of(model).status == "active"


def test_without_facts_about_the_graph_a_region_runs_exactly(monkeypatch) -> None:
    class Own(nn.Sequential):
        """No other test has captured it."""

    monkeypatch.setattr(torch._guards.TracingContext, "try_get", staticmethod(lambda: None))
    model, x = Own(nn.Linear(4, 4), nn.Tanh()), torch.randn(6, 4)
    bs.sketch_(model, bs.Region(keep=0.5))
    for _ in range(2):
        model(x).square().sum().backward()
    assert state_of(model).status == "exact"


def test_autocast_is_off_without_the_private_guard(monkeypatch) -> None:
    monkeypatch.delattr(torch._C, "_DisableAutocast")
    with torch.autocast("cpu", torch.bfloat16):
        with torch_private.without_autocast():
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


def test_a_wrapped_tensor_is_recognised(monkeypatch) -> None:
    seen = []
    torch.func.vmap(lambda x: seen.append(torch_private.is_functorch_wrapped(x)) or x)(
        torch.ones(2)
    )
    assert seen == [True]
    assert not torch_private.is_functorch_wrapped(torch.ones(2))
    monkeypatch.delattr(torch._C, "_functorch")
    assert torch_private.is_functorch_wrapped(torch.ones(2))


def test_batch_norm_without_the_private_entry(monkeypatch) -> None:
    x = torch.randn(8, 3, 4)
    expected = torch_private.batch_norm_with_statistics(x, None, None, (None, None), 0.1, 1e-5)
    monkeypatch.delattr(torch, "_batch_norm_impl_index")
    actual = torch_private.batch_norm_with_statistics(x, None, None, (None, None), 0.1, 1e-5)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)
