"""Published code of others beside ours: time, saved bytes, variance and bias, on one layer and one ViT.

    git clone https://github.com/thu-ml/VCAS ~/vcas         # and so on: ``PEERS`` names the repositories
    python benchmarks/peers.py layer --vcas ~/vcas --rad ~/rad --fewbit ~/fewbit --approx ~/approx \\
        --wtacrs ~/wtacrs
    python benchmarks/peers.py vit ...                      # the same options
    python benchmarks/peers.py layer_statistics ...
    python benchmarks/peers.py vit_statistics ...

Each peer is optional: one that is missing, or that does not run, is a row with its reason. Their code is put
on ``sys.path`` and called; none of it is here, and none of it is changed. Where an import or a shape is in the
way, the note of the peer says what we did about it.

Times are of one forward and one backward pass, all arms in turn in one process: medians of the ratios to exact.
Saved bytes count every storage that the autograd graph keeps, parameters apart, the input of the layer included.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import backsketch as bs
from backsketch.models import build
from backsketch.testing import Moments

KEEPS = (0.5, 0.25, 0.1)
SURE = 6.5
"""Above this |z| an entry is biased: by chance in one of ten billion entries."""
RARE = 40
"""Draws in which an entry must have deviated for its mean to be nearly normal."""

# --------------------------------------------------------------------------------------------------
# Cases: a model whose layers in ``blocks`` are approximated, and its input
# --------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """One ``Linear`` in one block. Shapes: ``(samples, tokens, in)`` to ``(samples, tokens, out)``."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Sequential(nn.Linear(d_in, d_out)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@dataclass(frozen=True)
class Case:
    """A model, its input, and the cotangent of its output; ``is_layer``: the input's gradient counts, too."""

    name: str
    model: nn.Module
    x: Tensor
    cotangent: Tensor
    is_layer: bool

    def step(self, model: nn.Module) -> list[Tensor]:
        """Gradients of the input, if it has one, and of the parameters, of one forward and backward.

        By ``backward``, as a training step does it: inside ``torch.autograd.grad`` RAD finds no gradient of
        the weight.
        """
        leaves = [self.x, *model.parameters()] if self.is_layer else list(model.parameters())
        for leaf in leaves:
            leaf.grad = None
        model(self.x).backward(self.cotangent)
        return [leaf.grad for leaf in leaves]

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """The same with names; of a model, all in one vector."""
        found = self.step(model)
        if self.is_layer:
            return {"grad_input": found[0], "grad_weight": found[1], "grad_bias": found[2]}
        return {"gradient": torch.cat([g.flatten() for g in found])}


def unequal_rows(samples: int, tokens: int, width: int) -> Tensor:
    """Random rows whose norms vary among samples and among tokens, log-normal with a deviation of 0.7 each."""
    scale = (0.7 * torch.randn(samples, 1, 1) + 0.7 * torch.randn(samples, tokens, 1)).exp()
    return torch.randn(samples, tokens, width) * scale


def layer(samples: int, tokens: int, d_in: int, d_out: int) -> Case:
    name = f"linear {samples * tokens}x{d_in}->{d_out}"
    x = torch.randn(samples, tokens, d_in, requires_grad=True)
    return Case(name, Layer(d_in, d_out), x, unequal_rows(samples, tokens, d_out), True)


def vit(batch: int, side: int, dim: int, depth: int) -> Case:
    shape = (3, side, side)
    model = build("vit", shape, 10, dim=dim, depth=depth, patch=4)
    name = f"vit d {dim}, {depth} blocks, {side**2 // 16} tokens, batch {batch}"
    labels = torch.randint(10, (batch,))
    x = torch.randn(batch, *shape)
    cotangent = (model(x).softmax(1) - nn.functional.one_hot(labels, 10)).detach() / batch
    return Case(name, model, x, cotangent, False)


# --------------------------------------------------------------------------------------------------
# Arms: a way of making the backward pass of a model cheaper
# --------------------------------------------------------------------------------------------------

Convert = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Arm:
    """``convert`` changes a model's ``blocks`` and returns what is to be called in its place."""

    who: str
    what: str
    keep: float | None
    convert: Convert


def ours() -> list[Arm]:
    """Our estimators, as texts for ``bs.parse``."""

    def convert(text: str, model: nn.Module) -> nn.Module:
        if text.startswith("region") and isinstance(model, Layer):
            text += ",row_dims=2"  # tokens of one layer are as independent as samples
        bs.sketch_(model.blocks, bs.parse(text))
        return model

    arms = []
    for text in ("rows:keep=", "stored_rows:keep=", "projection:keep=", "region:keep="):
        arms += [Arm("ours", text.split(":")[0], k, partial(convert, f"{text}{k}")) for k in KEEPS]
    arms += [
        Arm("ours", text, None, partial(convert, text)) for text in ("int8", "quantized:bits=4")
    ]
    return arms


def swapped(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """``model`` with each linear layer of its blocks made anew around the same parameters."""
    for parent in list(model.blocks.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, make(child))
    return model


def like(linear: nn.Linear, other: nn.Module) -> nn.Module:
    """Their layer with our layer's parameters."""
    other.weight, other.bias = linear.weight, linear.bias
    return other


class Flat(nn.Module):
    """A layer for matrices, given tokens. Shapes: ``(*, in)`` to ``(*, out)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


@contextmanager
def on_path(folder: Path) -> Iterator[None]:
    """Imports look into ``folder`` first."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder.name}: no such folder in the checkout")
    sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path.remove(str(folder))


# VCAS ---------------------------------------------------------------------------------------------


class AsTuple(nn.Module):
    """A block that returns a tuple, as those of transformers did; VCAS expects it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.inner(x),)


class First(nn.Module):
    """The first of what a block returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


def vcas(path: Path) -> list[Arm]:
    with on_path(path):
        package = importlib.import_module("vcas")
        linear = importlib.import_module("vcas.layers.linear").Linear
        sampler = importlib.import_module("vcas.layers.act_sampler").ActSampler

    def convert(samples: float, weights: float, model: nn.Module) -> nn.Module:
        linear.idx = sampler.idx = 0  # they count the layers of a process, not of a model
        for i, block in enumerate(model.blocks):
            model.blocks[i] = First(AsTuple(block))
        scheme = package.VcasSampleScheme(package.VcasSampleArguments())
        package.VcasModelProcessor(model.blocks, AsTuple, scheme).process()
        scheme.sample = True
        scheme.act_ratio_sched = [samples] * len(scheme.act_ratio_sched)
        scheme.w_ratio_list = [weights] * len(scheme.w_ratio_list)
        return model

    arms = [Arm("VCAS", "weights", k, partial(convert, 1.0, k)) for k in KEEPS]
    arms += [Arm("VCAS", "samples", k, partial(convert, k, 1.0)) for k in KEEPS]
    return arms + [Arm("VCAS", "samples, weights 0.5", k, partial(convert, k, 0.5)) for k in KEEPS]


# RAD ----------------------------------------------------------------------------------------------


def rad(path: Path) -> list[Arm]:
    if importlib.util.find_spec("torchvision") is None:
        sys.modules["torchvision"] = types.ModuleType("torchvision")  # imported, not used
    with on_path(path / "nn_experiments"):
        make = importlib.import_module("layers").RandLinear
    if not hasattr(sys.modules["torchvision"], "__file__"):
        del sys.modules["torchvision"]

    def convert(sparse: bool, keep: float, model: nn.Module) -> nn.Module:
        def one(linear: nn.Linear) -> nn.Module:
            sizes = (linear.in_features, linear.out_features)
            return Flat(like(linear, make(*sizes, keep_frac=keep, sparse=sparse)))

        return swapped(model, one)

    arms = [Arm("RAD", "projection", k, partial(convert, False, k)) for k in KEEPS]
    return arms + [Arm("RAD", "sampling", k, partial(convert, True, k)) for k in KEEPS]


# fewbit -------------------------------------------------------------------------------------------


def fewbit(path: Path) -> list[Arm]:
    for name in ("fewbit", "fewbit.functional", "fewbit.modules"):
        package = types.ModuleType(name)  # its own __init__ needs the compiled activations
        package.__path__ = [str(path.joinpath(*name.split(".")))]
        sys.modules[name] = package
    with on_path(path):
        layers = importlib.import_module("fewbit.modules.linear")

    def projected(kind: str, keep: float, model: nn.Module) -> nn.Module:
        def one(linear: nn.Linear) -> nn.Module:
            sizes = (linear.in_features, linear.out_features)
            return like(linear, layers.LinearGRP(*sizes, proj_dim_ratio=keep, matmul=kind))

        return swapped(model, one)

    def sampled(keep: float, model: nn.Module) -> nn.Module:
        def one(linear: nn.Linear) -> nn.Module:
            sizes = (linear.in_features, linear.out_features)
            return like(linear, layers.LinearCRS(*sizes, proj_dim=int(keep * sizes[0])))

        return swapped(model, one)

    kinds = ("gaussian", "rademacher", "dct", "dft")
    arms = [Arm("fewbit", kind, k, partial(projected, kind, k)) for kind in kinds for k in KEEPS]
    return arms + [Arm("fewbit", "crs", k, partial(sampled, k)) for k in KEEPS]


# approx -------------------------------------------------------------------------------------------


def approx(path: Path) -> list[Arm]:
    with on_path(path / "src" / "pytorch"):
        make = importlib.import_module("approx_mul_pytorch").approx_Linear

    def convert(keep: float, model: nn.Module) -> nn.Module:
        def one(linear: nn.Linear) -> nn.Module:
            ratios = {"sample_ratio_bwd": keep, "sample_ratio_wu": keep}
            least = {"minimal_k_bwd": 1, "minimal_k_wu": 1}
            sizes = (linear.in_features, linear.out_features)
            return Flat(like(linear, make(*sizes, **ratios, **least)))

        return swapped(model, one)

    return [Arm("approx", "both products", k, partial(convert, k)) for k in KEEPS]


# WTA-CRS ------------------------------------------------------------------------------------------


class Remembered(nn.Module):
    """What their trainer does around a step: the norms of the last epoch lie where the layers read them.

    The first call is exact and leaves its norms behind; the others find them, or zeros, as in a first epoch.
    """

    def __init__(self, inner: nn.Module, scheme: Any, is_first: bool) -> None:
        super().__init__()
        self.inner, self.scheme, self.is_first = inner, scheme, is_first
        self.norms: Tensor | None = None  # (samples, tokens of all layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.norms is not None:
            norms = torch.zeros_like(self.norms) if self.is_first else self.norms.clone()
            self.scheme._whole_grad_buffer_cat = self.scheme.batch_whole_grad = norms
            return self.inner(x)
        self.scheme._whole_grad_buffer_cat = None
        y = self.inner(x)
        self.norms = torch.zeros(len(x), self.scheme._grad_index_offset, dtype=torch.bfloat16)
        self.scheme.batch_whole_grad = self.norms  # the backward pass fills it in
        return y


def wtacrs(path: Path) -> list[Arm]:
    with on_path(path):
        package = importlib.import_module("seq2seq.approxlinear")
        scheme = importlib.import_module("seq2seq.approxlinear.scheme").Scheme

    def convert(is_first: bool, keep: float, model: nn.Module) -> nn.Module:
        config = package.ApproxLinearConfig()
        config.sampling_ratio = keep
        scheme._grad_index_offset, scheme._all_grad_shape = 0, []

        def one(linear: nn.Linear) -> nn.Module:
            sizes = (linear.in_features, linear.out_features)
            return like(linear, package.ApproxLinear(*sizes, config=config))

        return Remembered(swapped(model, one), scheme, is_first)

    arms = [Arm("WTA-CRS", "exact norms", k, partial(convert, False, k)) for k in KEEPS]
    return arms + [Arm("WTA-CRS", "first epoch", k, partial(convert, True, k)) for k in KEEPS]


# All of them --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A repository, the arms that its checkout gives, and what we did so that they run."""

    repository: str
    arms: Callable[[Path], list[Arm]]
    note: str = ""


PEERS = {
    "VCAS": Peer(
        "thu-ml/VCAS",
        vcas,
        "blocks return a tuple, as VCAS expects; its counters of layers start again for each model; the ratios "
        "are given, not adapted",
    ),
    "RAD": Peer(
        "PrincetonLIPS/RandomizedAutomaticDifferentiation",
        rad,
        "an empty module stands for torchvision, which is imported and not used; tokens are flattened",
    ),
    "fewbit": Peer(
        "SkoltechAI/fewbit",
        fewbit,
        "its linear layers are imported without the package's own imports, which fail without its compiled "
        "library",
    ),
    "approx": Peer("acsl-technion/approx", approx, "tokens are flattened"),
    "WTA-CRS": Peer(
        "zirui-ray-liu/WTACRS",
        wtacrs,
        "we put the norms where its trainer does: those of the very step (the best case) or zeros (a first epoch)",
    ),
}


def commit_of(path: Path) -> str:
    """Commit of a checkout, or nothing where it is none."""
    command = ["git", "-C", str(path), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()[:12]


def available(paths: dict[str, Path | None]) -> tuple[list[Arm], dict[str, dict]]:
    """Arms of every checkout that can be imported, and for each peer what became of it."""
    arms, about = [], {}
    for name, peer in PEERS.items():
        path = paths.get(name)
        about[name] = {"repository": peer.repository, "note": peer.note}
        if path is None:
            about[name]["reason"] = "no checkout was given"
            continue
        try:
            arms += peer.arms(path)
            about[name]["commit"] = commit_of(path)
        except Exception as problem:
            about[name]["reason"] = reason_of(problem)
    return arms, about


def reason_of(problem: Exception) -> str:
    """One line that says why something does not run."""
    return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem).strip() else ''}"[
        :160
    ]


# --------------------------------------------------------------------------------------------------
# Measurements
# --------------------------------------------------------------------------------------------------


def ready(case: Case, arms: list[Arm]) -> Iterator[tuple[Arm, nn.Module | Exception]]:
    """Each arm's model after one step (a region captures, norms are remembered), or why there is none."""
    for arm in arms:
        try:
            torch.manual_seed(0)
            model = arm.convert(copy.deepcopy(case.model).train())
            case.step(model)
            yield arm, model
        except Exception as problem:
            yield arm, problem


def kept_bytes(case: Case, model: nn.Module) -> int:
    """Bytes of the distinct storages that a forward pass keeps, parameters apart.

    Also what a function keeps as an attribute of its context, which hooks on saved tensors do not see.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage)
        return tensor

    with saved_tensors_hooks(see, lambda tensor: tensor):
        output = model(case.x)
    for node in nodes(output.grad_fn):
        for value in getattr(node, "__dict__", {}).values():
            for part in value if isinstance(value, tuple | list) else [value]:
                if isinstance(part, Tensor):
                    see(part)
    for parameter in (*model.parameters(), *model.buffers()):
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def nodes(root: Any) -> Iterator[Any]:
    """Nodes of an autograd graph."""
    seen, stack = set(), [root]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [following for following, _ in node.next_functions]


EXACT = Arm("", "exact", None, lambda model: model)


def timed(case: Case, arms: list[Arm], repeats: int, deadline: float = float("inf")) -> list[dict]:
    """Time and bytes of every arm over exact; after ``deadline`` no round begins but two."""
    rows, models = [], {}
    for i, (arm, model) in enumerate(ready(case, [EXACT, *arms])):
        rows.append({"who": arm.who, "what": arm.what, "keep": arm.keep})
        if isinstance(model, Exception):
            rows[i]["reason"] = reason_of(model)
        else:
            models[i] = model
            rows[i]["bytes"] = kept_bytes(case, model)
    seconds: dict[int, list[float]] = {i: [] for i in models}
    for repeat in range(repeats):
        if repeat > 1 and time.monotonic() > deadline:
            break
        for i, model in models.items():
            start = time.process_time()
            case.step(model)
            seconds[i].append(time.process_time() - start)
    for i, values in seconds.items():
        rows[i]["repeats"] = len(values)
        rows[i]["ms"] = round(1e3 * statistics.median(values), 2)
        rows[i]["time"] = round(statistics.median(v / e for v, e in zip(values, seconds[0])), 3)
        rows[i]["saved"] = round(rows[i].pop("bytes") / max(kept_bytes(case, models[0]), 1), 4)
    return rows


def bias_of(moments: Moments) -> dict:
    """The mean of the draws against exact: z of every entry and along the exact gradient, and relative error.

    ``entry`` is the one that is farthest out, ``out`` the number of entries beyond ``SURE``; ``along`` is the mean
    along the exact gradient over its square, less one.
    """
    exact, draws = moments.exact, moments.draws
    z = (deviation(moments) / standard_error(moments)).flatten()
    along = torch.cat(moments.along)[:, 0] / exact.square().sum()
    rounding = float((torch.as_tensor(moments.rounding) * exact.abs()).sum() / exact.square().sum())
    z_along = max(abs(float(along.mean())) - rounding, 0.0) * draws**0.5
    worst = int(z.argmax())
    found = {
        "variance": float(f"{float(moments.variance / exact.square().sum()):.4g}"),
        "z": round(float(z[worst]), 2),
        "entry": [int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape)],
        "entries": exact.numel(),
        "out": int((z > SURE).sum()),
        "along": round(float(along.mean()), 5),
        "z_along": round(z_along / max(float(along.std()), 1e-300), 2),
    }
    return found | {"biased": max(found["z"], found["z_along"]) > SURE}


def deviation(moments: Moments) -> Tensor:
    """How far the mean of each entry is from exact, beyond rounding."""
    return ((moments.first / moments.draws).abs() - moments.rounding).clamp(min=0)


def standard_error(moments: Moments) -> Tensor:
    """Of the mean of each entry, with what the normal law misses: a row hardly ever drawn or missed."""
    m = moments
    mean = m.first / m.draws
    error = ((m.second / m.draws - mean.square()).clamp(min=0) / (m.draws - 1)).sqrt()
    is_absent = m.mean.abs() <= 1e-6 * m.exact.abs()  # in every draw
    is_rare = (m.second.square() < RARE * m.fourth) | is_absent
    event = torch.where(is_rare, m.largest, m.mean.abs())
    return torch.maximum(error, SURE * event / m.draws).clamp(min=1e-300)


def drawn(case: Case, arms: list[Arm], draws: int, deadline: float = float("inf")) -> list[dict]:
    """Relative variance and bias of every arm's gradients; arms after ``deadline`` are left out."""
    rows = []
    exact = case.gradients(case.model)
    for arm, model in ready(case, arms):
        if time.monotonic() > deadline:
            break
        row: dict = {"who": arm.who, "what": arm.what, "keep": arm.keep}
        rows.append(row)
        if isinstance(model, Exception):
            row["reason"] = reason_of(model)
            continue
        bs.seed(0)
        moments = {name: Moments(gradient) for name, gradient in exact.items()}
        for _ in range(draws):
            for name, gradient in case.gradients(model).items():
                moments[name].add(gradient)
        row |= {name: bias_of(m) for name, m in moments.items()}
        print(row, flush=True)
    return rows


PARTS: dict[str, tuple[Callable[[], Case], Callable, str]] = {
    "layer": (partial(layer, 64, 64, 384, 1536), timed, "repeats"),
    "vit": (partial(vit, 64, 32, 192, 6), timed, "repeats"),
    "layer_statistics": (partial(layer, 64, 4, 48, 64), drawn, "draws"),
    "vit_statistics": (partial(vit, 16, 16, 32, 2), drawn, "draws"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    for name, peer in PEERS.items():
        help_text = f"checkout of {peer.repository}"
        parser.add_argument(
            f"--{name.lower().replace('-', '')}", type=Path, help=help_text, dest=name
        )
    parser.add_argument("--keeps", type=float, nargs="*", default=KEEPS)
    parser.add_argument("--skip", nargs="*", default=[], help="arms, such as dct")
    parser.add_argument("--seconds", type=float, default=3600, help="begin nothing after them")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("results/peers.json"))
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + arguments.seconds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bs.seed(0)
    make, measure, number = PARTS[arguments.part]
    theirs, about = available({name: getattr(arguments, name) for name in PEERS})
    arms = [
        arm
        for arm in ours() + theirs
        if arm.what not in arguments.skip and (arm.keep is None or arm.keep in arguments.keeps)
    ]
    case = make()
    rows = measure(case, arms, getattr(arguments, number), deadline)
    about_run = {
        "what": case.name,
        number: getattr(arguments, number),
        "device": f"{platform.machine()}, one thread",
        "torch": torch.__version__,
    }
    store(arguments.out, arguments.part, about, about_run, rows)


def store(path: Path, part: str, about: dict, about_run: dict, rows: list[dict]) -> None:
    """Write the rows among those of earlier runs; the same arms' are replaced."""
    result = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    earlier = result["parts"].get(part, {}).get("rows", [])
    measured = {(row["who"], row["what"], row["keep"]) for row in rows}
    kept = [row for row in earlier if (row["who"], row["what"], row["keep"]) not in measured]
    result["peers"] = about
    result["parts"][part] = about_run | {"rows": kept + rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
