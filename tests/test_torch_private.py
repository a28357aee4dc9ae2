"""Private interfaces of PyTorch are used in one module, and each has a fallback that works."""

from __future__ import annotations

import ast
import types
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


OF_OTHERS = {"_exit", "_reset_state", "_experts_implementation"}
"""Of Python, of accelerate and of transformers."""


def defined(tree: ast.AST) -> set[str]:
    """Names that a file gives to something: functions, classes, variables, attributes of ``self`` and text."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) == "self":
                found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            found.add(ast.literal_eval(node.args[1]))
    return found


def asked_for(tree: ast.AST) -> set[str]:
    """Private attributes that a file asks something else than ``self`` for, and not the operators of ATen."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            if not isinstance(node.args[1], ast.Constant):
                continue
            owner, name = node.args[0], node.args[1].value
        else:
            continue
        foreign = ast.unparse(owner) not in ("self", "cls", "aten")
        if foreign and name.startswith("_") and not name.endswith("__"):
            found.add(name)
    return found


def test_private_attributes_are_asked_for_in_one_module() -> None:
    """A private attribute that nothing in the package defines is one of PyTorch."""
    files = {
        p.relative_to(SOURCE).as_posix(): ast.parse(p.read_text()) for p in SOURCE.rglob("*.py")
    }
    own = set().union(*map(defined, files.values()))
    users = {name: asked_for(tree) - own - OF_OTHERS for name, tree in files.items()}
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


def test_what_a_module_and_an_operator_are_asked_for_may_be_missing() -> None:
    compiled = torch.compile(model := nn.Linear(2, 2), backend="eager")
    assert torch_private.compiled_from(compiled) is model
    assert torch_private.is_compiled(compiled)
    assert torch_private.compiled_from(model) is None
    assert not torch_private.is_compiled(model)
    bare = types.SimpleNamespace()
    assert torch_private.compiled_from(bare) is None
    assert not torch_private.is_compiled(bare)
    assert torch_private.buffers_of(bare) == {}
    assert torch_private.is_view(bare)
    dropout = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert torch_private.position_of(dropout, "dropout_p") == 3
    assert torch_private.position_of(torch.ops.aten.mm.default, "dropout_p") is None
    assert torch_private.position_of(bare, "dropout_p") is None
    assert torch_private.changes_arguments(torch.ops.aten.add_.Tensor)
    assert not torch_private.changes_arguments(torch.ops.aten.add.Tensor)
    assert torch_private.changes_arguments(bare)


def test_batch_norm_without_the_private_entry(monkeypatch) -> None:
    x = torch.randn(8, 3, 4)
    expected = torch_private.batch_norm_with_statistics(x, None, None, (None, None), 0.1, 1e-5)
    monkeypatch.delattr(torch, "_batch_norm_impl_index")
    actual = torch_private.batch_norm_with_statistics(x, None, None, (None, None), 0.1, 1e-5)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)
