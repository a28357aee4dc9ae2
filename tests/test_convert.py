"""``sketch_`` and ``restore_``: the rules, the errors that change nothing, the report."""

from __future__ import annotations

import inspect
import types
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import backsketch as bs
from backsketch.nn.swap import is_swapped, sketch_of
from helpers import equal, gradients, images

# torch.compile imports a part of PyTorch that warns about another.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")

ROWS, COLUMNS = bs.Rows(keep=0.5), bs.Columns(keep=0.25)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Nested(nn.Module):
    """Every kind of layer that is known, nested, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            h = block(h)
        return self.head(h + self.attention(h, h, h, need_weights=False)[0])


LAYERS = ["stem", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "attention", "head"]  # fmt: skip
BLOCKS = [name for name in LAYERS if name.startswith("blocks")]
LINEARS = [*BLOCKS, "head"]


def sketches(model: nn.Module) -> dict[str, bs.Estimator]:
    return {name: sketch_of(m) for name, m in model.named_modules() if is_swapped(m)}


def fingerprint(model: nn.Module) -> list[tuple[object, ...]]:
    """Everything a conversion could touch: identities, classes, instance dicts in order, bits."""
    found: list[tuple[object, ...]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        found.append((name, id(module), type(module)))
        for key, value in module.__dict__.items():
            inner = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else id(value)
            found.append((name, key, inner))
    for key, tensor in model.state_dict().items():
        found.append((key, tensor.data_ptr(), tensor.numpy().tobytes()))
    return found


# --------------------------------------------------------------------------------------------------
# Rules
# --------------------------------------------------------------------------------------------------

RULES = {
    "an estimator alone goes to every layer": (ROWS, dict.fromkeys(LAYERS, ROWS)),
    "the empty name is the model": ({"": ROWS}, dict.fromkeys(LAYERS, ROWS)),
    "a star matches across dots": ({"*": ROWS}, dict.fromkeys(LAYERS, ROWS)),
    "a plain name": ({"head": ROWS}, {"head": ROWS}),
    "a question mark is one character": (
        {"blocks.?.up": ROWS},
        {"blocks.0.up": ROWS, "blocks.1.up": ROWS},
    ),
    "a character class": (
        {"blocks.[1-9]": ROWS},
        {"blocks.1.up": ROWS, "blocks.1.down": ROWS},
    ),
    "a container stands for all below it": ({"blocks": ROWS}, dict.fromkeys(BLOCKS, ROWS)),
    "an expression": ({r"re:.*\.(up|down)": ROWS}, dict.fromkeys(BLOCKS, ROWS)),
    "a type": ({nn.Linear: ROWS}, dict.fromkeys(LINEARS, ROWS)),
    "a type that is a container": ({Block: ROWS}, dict.fromkeys(BLOCKS, ROWS)),
    "two types": (
        {nn.Conv2d: COLUMNS, nn.MultiheadAttention: ROWS},
        {"stem": COLUMNS, "attention": ROWS},
    ),
    "the first match wins": (
        {"head": COLUMNS, nn.Linear: ROWS},
        {**dict.fromkeys(LINEARS, ROWS), "head": COLUMNS},
    ),
    "first means written first, not closest": (
        {"blocks": ROWS, "blocks.0.up": None},
        dict.fromkeys(BLOCKS, ROWS),
    ),
    "None means exact": (
        {"head": None, "blocks.0": None, "": ROWS},
        {n: ROWS for n in LAYERS if n != "head" and not n.startswith("blocks.0")},
    ),
    "keep = 1 means exact": ({"head": bs.Rows(keep=1), "stem": ROWS}, {"stem": ROWS}),
    "Exact means exact": ({"head": bs.Exact(), "stem": ROWS}, {"stem": ROWS}),
    "only None": ({"head": None}, {}),
    "a plan carries its rules": (SimpleNamespace(rules={"head": ROWS}), {"head": ROWS}),
}


@pytest.mark.parametrize("case", RULES)
def test_rules(case):
    rules, expected = RULES[case]
    model = Nested()
    report = bs.sketch_(model, rules)
    assert sketches(model) == expected
    assert {site.name: site.sketch for site in report.sketched} == expected
    assert [site.name for site in report] == [*LAYERS[:6], "attention.out_proj", "head"]


def test_an_expression_must_match_the_whole_name():
    with pytest.raises(ValueError, match="matches no module"):
        bs.sketch_(Nested(), {"re:block": ROWS})


def test_globs_are_case_sensitive():
    with pytest.raises(ValueError, match="matches no module"):
        bs.sketch_(Nested(), {"HEAD": ROWS})


def test_a_subclass_that_keeps_its_forward_is_sketched_and_stays_what_it_is():
    class Named(nn.Linear):
        label = "mine"

        def describe(self) -> str:
            return f"{self.label}: {self.out_features}"

    model = nn.Sequential(Named(4, 3))
    bs.sketch_(model, {nn.Linear: ROWS})
    assert is_swapped(model[0])
    assert isinstance(model[0], Named)
    assert model[0].describe() == "mine: 3"
    bs.restore_(model)
    assert type(model[0]) is Named


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, features: Tensor, scale: float = 1.0) -> Tensor:
        return self.inner(features) * scale


@pytest.mark.parametrize("sketch", [bs.Region(keep=0.5), bs.Mask(keep=0.5)], ids=["region", "mask"])
class TestForward:
    def test_it_keeps_its_signature(self, sketch):
        """Trainers choose the columns of a dataset by it."""
        model = Keyed()
        bs.sketch_(model, sketch)
        assert list(inspect.signature(model.forward).parameters) == ["features", "scale"]

    def test_classes_do_not_share_the_code_that_a_compiler_counts_by(self, sketch):
        first, second = Keyed(), nn.Sequential(nn.Linear(4, 3))
        for model in (first, second):
            bs.sketch_(model, sketch)
        assert type(first).forward.__code__ is not type(second).forward.__code__

    def test_a_copy_on_the_instance_outlives_the_sketch(self, sketch):
        """Accelerate puts one there under mixed precision."""
        model, x = Keyed(), torch.randn(8, 4)
        bs.sketch_(model, sketch)
        model.forward = types.MethodType(model.forward.__func__, model)
        model(x).square().sum().backward()
        bs.restore_(model)
        model.zero_grad()
        model(x).square().sum().backward()
        (expected,) = torch.autograd.grad(
            Keyed.forward(model, x).square().sum(), model.inner.weight
        )
        assert torch.equal(model.inner.weight.grad, expected)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"second": self.first})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["second"](self.first(x))


@pytest.mark.parametrize("pattern", ["first", "inner.second", "inner", "re:.*second", nn.Linear])
def test_a_shared_module_is_found_under_all_its_names_and_reported_once(pattern):
    model = Shared()
    report = bs.sketch_(model, {pattern: ROWS})
    assert [site.name for site in report] == ["first"]
    assert is_swapped(model.first)
    assert model.first is model.inner["second"]
    bs.restore_(model)
    assert type(model.first) is nn.Linear


@pytest.mark.parametrize("first", ["first", "inner.second"])
def test_for_a_shared_module_too_the_first_rule_wins(first):
    other = {"first": "inner.second", "inner.second": "first"}[first]
    model = Shared()
    with pytest.raises(ValueError, match=f"'{other}' has no effect: earlier patterns"):
        bs.sketch_(model, {first: None, other: ROWS})
    bs.sketch_(model, {first: ROWS, other: None})
    assert sketch_of(model.first) == ROWS


def test_the_inner_projection_of_attention_is_not_a_site_of_its_own():
    model = Nested()
    report = bs.sketch_(model, ROWS)
    inner = model.attention.out_proj
    assert not is_swapped(inner)
    assert report["attention.out_proj"].sketch is None
    assert "MultiheadAttention 'attention' reads its weights" in report["attention.out_proj"].reason
    with pytest.raises(ValueError, match="'attention' reads its weights itself: sketch that one"):
        bs.sketch_(model, {"attention.out_proj": ROWS})


def test_the_model_itself_may_be_a_layer():
    layer = nn.Linear(4, 4)
    assert bs.sketch_(layer, ROWS)[""].sketch == ROWS
    assert is_swapped(layer)
    assert type(bs.restore_(layer)) is nn.Linear


# --------------------------------------------------------------------------------------------------
# Errors: each says what to do, all at once, and nothing has changed
# --------------------------------------------------------------------------------------------------

BAD_RULES = {
    "no match": ({"block": ROWS}, ValueError, "'block' matches no module; near names: blocks"),
    "near names": ({"blocks.1.upp": ROWS}, ValueError, r"near names:.*blocks\.1\.up"),
    "no match, expression": ({"re:heat": ROWS}, ValueError, "'re:heat'.*near names: head"),
    "malformed expression": ({"re:(": ROWS}, ValueError, r"'re:\(' is not a regular expression"),
    "no match, type": ({nn.Conv1d: ROWS}, ValueError, "no module is a Conv1d; the model has.*Linear"),
    "good and bad": ({"head": ROWS, "nose": ROWS}, ValueError, "'nose' matches no module"),
    "a layer that is not known": ({"norm": ROWS}, ValueError, "LayerNorm has no products to sketch"),
    "no effect": ({"": ROWS, "head": COLUMNS}, ValueError, "'head' has no effect: earlier patterns"),
    "empty": ({}, TypeError, "non-empty mapping"),
    "nothing": (None, TypeError, "rules must be a sketch"),
    "text": ("int8", TypeError, r"rules must be a sketch.*'int8'; turn text .* with bs\.parse"),
    "a number": (0.5, TypeError, "rules must be a sketch"),
    "a list": ([ROWS], TypeError, "rules must be a sketch"),
    "text for a sketch": ({"head": "rows:keep=0.5"}, TypeError, r"bs\.parse"),
    "a class for a sketch": ({"head": bs.Rows}, TypeError, "is not a sketch"),
    "a number for a pattern": ({3: ROWS}, TypeError, "neither a name pattern, nor a module type"),
    "a type that is no module": ({int: ROWS}, TypeError, "neither a name pattern, nor a module"),
}  # fmt: skip


@pytest.mark.parametrize("sketched_before", [False, True], ids=["fresh", "sketched"])
@pytest.mark.parametrize("case", BAD_RULES)
def test_an_error_names_the_problem_and_changes_nothing(case, sketched_before):
    rules, error, message = BAD_RULES[case]
    model = Nested()
    if sketched_before:
        bs.sketch_(model, {"head": None, "stem": COLUMNS, "": ROWS})
    before, state = fingerprint(model), bs.get_rng_state()
    with pytest.raises(error, match=message):
        bs.sketch_(model, rules)
    assert fingerprint(model) == before
    assert bs.get_rng_state() == state


def test_exact_wants_a_module():
    with pytest.raises(TypeError, match=r"torch.nn.Module; got NoneType"), bs.exact(None):
        pass


def test_an_error_inside_an_exact_block_leaves_the_block_exact():
    model = Nested()
    bs.sketch_(model, ROWS)
    with bs.exact(model):
        before = fingerprint(model)
        with pytest.raises(ValueError, match="matches no module"):
            bs.sketch_(model, {"nose": ROWS})
        assert fingerprint(model) == before


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError, match="nothing was changed") as caught:
        bs.sketch_(Nested(), {"nose": ROWS, nn.Conv3d: ROWS, "norm": ROWS, "head": ROWS})
    for part in ("'nose'", "Conv3d", "LayerNorm"):
        assert part in str(caught.value)


@pytest.mark.parametrize("model", [None, Nested, torch.zeros(2), [nn.Linear(2, 2)]])
def test_only_modules_are_converted(model):
    with pytest.raises(TypeError, match=r"acts on a torch\.nn\.Module"):
        bs.sketch_(model, ROWS)
    with pytest.raises(TypeError, match=r"acts on a torch\.nn\.Module"):
        bs.restore_(model)


def test_a_model_without_any_layer_is_an_error():
    with pytest.raises(ValueError, match="no layer to sketch in"):
        bs.sketch_(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), ROWS)


# --------------------------------------------------------------------------------------------------
# Layers that are refused, each with its reason
# --------------------------------------------------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight * 2, bias)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def replaced_on_the_instance() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


def parametrized() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(4, 4))


REFUSED = {
    "overridden forward": (lambda: OwnForward(4, 4), "OwnForward overrides Linear.forward"),
    "overridden helper": (
        lambda: OwnConvForward(2, 4, 3),
        "OwnConvForward overrides Conv2d._conv_forward",
    ),
    "overridden attention": (
        lambda: OwnAttention(4, 2),
        "OwnAttention overrides MultiheadAttention.forward",
    ),
    "forward replaced on the instance": (
        replaced_on_the_instance,
        "forward was replaced on the instance",
    ),
    "parametrized": (parametrized, "parametrized.*remove the parametrization first"),
    "lazy": (lambda: nn.LazyLinear(4), "no weights yet: run one batch"),
    "lazy convolution": (lambda: nn.LazyConv2d(4, 3), "no weights yet: run one batch"),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "dtype torch.complex64"),
    "unknown": (lambda: nn.Bilinear(2, 2, 2), "Bilinear: its product is trilinear"),
    "single column": (lambda: nn.Linear(4, 1), "single output column"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_layer_is_an_error_alone_and_a_reason_in_company(case):
    build, reason = REFUSED[case]
    layer = build()
    before = (type(layer), dict(layer.__dict__))
    with pytest.raises(ValueError, match=reason):
        bs.sketch_(layer, COLUMNS)
    assert (type(layer), dict(layer.__dict__)) == before

    model = nn.Sequential(nn.Linear(4, 4), layer)
    report = bs.sketch_(model, COLUMNS)
    assert is_swapped(model[0])
    assert not is_swapped(layer)
    if case != "unknown":
        assert report["1"].sketch is None
        assert reason.split(".*")[0] in report["1"].reason
    with pytest.raises(ValueError, match=reason):
        bs.sketch_(model, {"1": COLUMNS})


def test_a_lazy_layer_can_be_sketched_once_it_has_weights():
    model = nn.Sequential(nn.LazyLinear(4))
    model(torch.zeros(2, 3))
    assert bs.sketch_(model, ROWS)["0"].sketch == ROWS


def test_a_parametrized_layer_can_be_sketched_once_it_is_plain():
    layer = parametrized()
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert bs.sketch_(layer, ROWS)[""].sketch == ROWS


def test_the_same_layer_may_suit_one_estimator_and_not_another():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    report = bs.sketch_(model, {"0": COLUMNS, "1": ROWS})
    assert [site.sketch for site in report] == [COLUMNS, ROWS]


# --------------------------------------------------------------------------------------------------
# Again, and back
# --------------------------------------------------------------------------------------------------


def test_a_second_call_replaces_the_first_whole():
    model = Nested()
    bs.sketch_(model, ROWS)
    bs.sketch_(model, {"head": COLUMNS})
    assert sketches(model) == {"head": COLUMNS}


def test_sketching_twice_is_sketching_once():
    model = Nested()
    first = bs.sketch_(model, ROWS)
    before = fingerprint(model)
    second = bs.sketch_(model, ROWS)
    assert fingerprint(model) == before
    assert str(first) == str(second)


def test_restore_gives_back_exactly_the_earlier_object():
    model = Nested()
    model.head.register_forward_hook(lambda *_: None)
    model.head.note = "mine"
    before = fingerprint(model)
    bs.sketch_(model, ROWS)
    assert fingerprint(model) != before
    bs.sketch_(model, {"head": COLUMNS, "stem": ROWS})
    with bs.exact(model):
        pass
    assert bs.restore_(model) is model
    assert fingerprint(model) == before


def test_restore_inside_an_exact_block_leaves_no_trace():
    model = Nested()
    before = fingerprint(model)
    bs.sketch_(model, ROWS)
    with bs.exact(model):
        bs.restore_(model)
    assert fingerprint(model) == before


def test_restore_leaves_a_model_that_is_not_sketched_alone():
    model = Nested()
    before = fingerprint(model)
    assert bs.restore_(bs.restore_(model)) is model
    assert fingerprint(model) == before


def test_after_restore_the_gradients_are_bit_identical_to_a_model_never_sketched():
    model, x = Nested(), images()
    before = gradients(model, x)
    bs.sketch_(model, ROWS)
    assert not equal(before, gradients(model, x))
    bs.restore_(model)
    assert equal(before, gradients(model, x))


# --------------------------------------------------------------------------------------------------
# Wrappers
# --------------------------------------------------------------------------------------------------

WRAPPERS = {
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "compiled DataParallel": lambda m: torch.compile(nn.DataParallel(m)),
    "DataParallel of compiled": lambda m: nn.DataParallel(torch.compile(m)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_those_of_the_users_own_module_whatever_wraps_it(wrapper):
    model = Nested()
    wrapped = WRAPPERS[wrapper](model)
    before = fingerprint(model)
    report = bs.sketch_(wrapped, {"head": COLUMNS, "": ROWS})
    assert report["head"].sketch == COLUMNS
    assert sketches(model) == {**dict.fromkeys(LAYERS, ROWS), "head": COLUMNS}
    with bs.exact(wrapped):
        assert model.head._backsketch_exact
    assert bs.restore_(wrapped) is wrapped
    assert fingerprint(model) == before


def test_a_part_that_is_compiled_in_place_is_sketched_with_the_rest():
    model = Nested()
    model.blocks[0] = torch.compile(model.blocks[0])
    bs.sketch_(model, {"blocks.0.*": ROWS})
    assert sketches(model) == {f"blocks.0._orig_mod.{n}": ROWS for n in ("up", "down")}


# --------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------


def test_the_report_predicts_each_site():
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.Linear(256, 256))
    report = bs.sketch_(
        model, {"0": bs.Rows(keep=0.25), "2": bs.StoredRows(keep=0.5), "3": bs.Quantized(bits=4)}
    )
    assert [(s.work, s.saved) for s in report] == [
        ((0.25, 0.25), 1.0),
        ((1.0, 0.5), 0.5),
        ((1.0, 1.0), 4 / 32 + 2 / 64),
    ]
    assert report["0"].backward == 0.25
    assert report["2"].backward == 0.75
    assert [s.reason for s in report] == ["", "", ""]


def test_the_report_says_why_a_site_is_exact_and_what_to_expect_of_a_small_one():
    report = bs.sketch_(Nested(), {"head": None, "blocks.0": bs.Exact(), "stem": ROWS})
    assert report["head"].reason == "left exact by a rule"
    assert report["blocks.0.up"].reason == "left exact by exact"
    assert report["attention"].reason == "no rule matches it"
    assert report["stem"].reason == "small: expect no gain in time"
    assert len(report.exact) == len(report) - 1 == 7


def test_the_report_prints_as_a_table_with_one_line_a_site():
    text = str(bs.sketch_(Nested(), {"head": None, "": bs.Rows(keep=0.25, scores="l2")}))
    lines = text.splitlines()
    assert lines[0].split() == ["site", "type", "sketch", "grad_input", "grad_weight", "saved"]
    assert set(lines[1]) == {"-", " "}
    assert len(lines) == 2 + 8 + 2
    columns = ["stem", "Conv2d", "rows:keep=0.25,scores=l2", "×0.25", "×0.25", "×1.00"]
    assert lines[2].split()[:6] == columns
    assert lines[2].endswith("small: expect no gain in time")
    assert lines[-3].split()[:3] == ["head", "Linear", "exact"]
    assert lines[-2].startswith("6 of 8 sites sketched")
    assert lines[-1].startswith("97 % of the backward arithmetic is sketched")
    starts = {line.index(word) for line, word in zip(lines[2:5], ["Conv2d", "Linear", "Linear"])}
    assert len(starts) == 1


def test_a_region_that_runs_exactly_claims_nothing_in_the_report():
    model = nn.Sequential(nn.Flatten(0), nn.Linear(8, 8), nn.ReLU())
    report = bs.sketch_(model, bs.Region(keep=0.5))
    assert [site.name for site in report.sketched] == [""]
    assert "×0.50" in str(report)
    model(torch.randn(4, 2)).sum().backward()
    assert report[""].status.startswith("runs exactly")
    assert report.sketched == []
    assert [site.name for site in report.exact] == [""]
    assert report[""].backward == 1
    assert "×" not in str(report)
    assert str(report).splitlines()[-2].startswith("0 of 1 sites sketched")
    assert str(report).splitlines()[-1].startswith("0 % of the backward arithmetic")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 64, 8))
        self.words = nn.Embedding(1000, 8)
        self.first, self.second = nn.Bilinear(8, 8, 3), nn.Bilinear(8, 8, 3)
        self.lstm = nn.LSTM(8, 8)
        self.head = parametrizations.weight_norm(nn.Linear(8, 8))


def test_the_report_names_layers_of_kinds_that_are_not_known():
    model = Recurrent()
    report = bs.sketch_(model, {"head": None, "": bs.Mask(keep=0.5)})
    weights = (model.first, model.second, model.lstm)
    size = sum(p.numel() for m in weights for p in m.parameters() if p.dim() > 1)
    share = f"{100 * size / sum(p.numel() for p in model.parameters()):.0f} %"
    expected = (
        f"not known, so exact: 2 Bilinear, 1 LSTM; {share} of the parameters; Bilinear: its product"
    )
    assert str(report).splitlines()[-2].startswith(expected)
    assert "not known" not in str(bs.sketch_(Recurrent(), bs.Region(keep=0.5)))
    assert "not known" not in str(bs.sketch_(Nested(), ROWS))


def test_the_report_of_a_bare_layer_prints_a_name():
    assert "(model)" in str(bs.sketch_(nn.Linear(4, 4), ROWS))


def test_an_unknown_site_lists_those_there_are():
    with pytest.raises(KeyError, match=r"no site 'nose'.*stem"):
        bs.sketch_(Nested(), ROWS)["nose"]


def test_a_sketched_module_shows_its_sketch_when_printed():
    model = Nested()
    plain = repr(model)
    bs.sketch_(model, {"head": bs.Rows(keep=0.5)})
    assert "in_features=8, out_features=3, bias=True, sketch=rows:keep=0.5" in repr(model)
    bs.restore_(model)
    assert repr(model) == plain
