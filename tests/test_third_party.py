"""Models that we did not write: from the ``transformers`` library, tiny, with random weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import backsketch as bs
from backsketch.nn.swap import is_swapped
from cases import FAMILIES
from mutations import drop_the_weights

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def bert() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **SHAPE)
    tokens = torch.randint(50, (4, 12))
    mask = torch.ones_like(tokens)
    mask[0, 8:] = 0
    labels = torch.randint(2, (4,))
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return transformers.BertForSequenceClassification(config), batch


def vit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=3, num_labels=5, **SHAPE
    )
    batch = {"pixel_values": torch.randn(6, 3, 8, 8), "labels": torch.randint(5, (6,))}
    return transformers.ViTForImageClassification(config), batch


MODELS = {"bert": bert, "vit": vit}
every_model = pytest.mark.parametrize("kind", MODELS)
# Importing the library warns about others.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@every_model
@pytest.mark.parametrize("estimator", FAMILIES, ids=str)
def test_three_steps_of_training_and_back(kind, estimator):
    model, batch = MODELS[kind]()
    model.train()
    types = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    report = bs.sketch_(model, estimator)
    assert len(report.sketched) == len([m for m in model.modules() if is_swapped(m)]) > 12
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        assert bool(loss.isfinite())
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    bs.restore_(model)
    assert [type(m) for m in model.modules()] == types
    assert list(model.state_dict()) == keys


@every_model
def test_forward_values_are_those_of_the_unconverted_model(kind):
    model, batch = MODELS[kind]()
    twin = copy.deepcopy(model)
    bs.sketch_(twin, bs.Rows(keep=0.5))
    for training in (True, False):
        outputs = []
        for m in (model.train(training), twin.train(training)):
            torch.manual_seed(0)
            outputs.append(m(**batch).logits)
        assert torch.equal(*outputs)


class Logits(nn.Module):
    """The model as a function of one tensor of floats, for ``check_unbiased``."""

    def __init__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.model, self.batch = model, {k: v for k, v in batch.items() if k != "labels"}

    def forward(self) -> torch.Tensor:
        return self.model(**self.batch).logits


@pytest.mark.fast_cases("vit")
@every_model
def test_gradients_of_all_parameters_are_unbiased(kind):
    model, batch = MODELS[kind]()
    bs.sketch_(model, {"*attention*": bs.StoredRows(keep=0.5), "": bs.Rows(keep=0.5)})
    bs.testing.check_unbiased(Logits(model, batch).train(), draws=150)


def test_a_wrong_weight_is_noticed_in_such_a_model(monkeypatch):
    model, batch = vit()
    bs.sketch_(model, {"*attention*": bs.StoredRows(keep=0.5), "": bs.Rows(keep=0.5)})
    drop_the_weights(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        bs.testing.check_unbiased(Logits(model, batch).train(), draws=100)


@every_model
def test_save_and_load_of_the_library_go_through(kind, tmp_path):
    model, batch = MODELS[kind]()
    bs.sketch_(model, bs.Rows(keep=0.5))
    model.eval()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert not any(is_swapped(m) for m in again.modules())


@every_model
def test_the_librarys_own_checkpointing_works(kind):
    model, batch = MODELS[kind]()
    bs.sketch_(model, bs.Projection(keep=0.5))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model(**batch).loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) > 30
    assert all(bool(g.isfinite().all()) for g in grads)


# Adapters --------------------------------------------------------------------------------------------


def adapted(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], r=2))


RULES = {"*lora_*": None, "": bs.Rows(keep=0.5)}


@pytest.mark.parametrize("order", ["base first", "adapters first"])
def test_adapters_go_onto_sketched_bases_in_either_order(order):
    model, batch = bert()
    if order == "base first":
        bs.sketch_(model, bs.Rows(keep=0.5))
        model = adapted(model)
        assert any(is_swapped(m) for n, m in model.named_modules() if n.endswith("base_layer"))
        bs.restore_(model)
    else:
        model = adapted(model)
    report = bs.sketch_(model, RULES)
    frozen = {site.name for site in report if site.frozen}
    assert all("lora_" not in name for name in frozen)
    assert {site.name.split(".")[-1] for site in report.exact} == {"default"}
    assert any(name.endswith("query.base_layer") for name in frozen)
    model.train()
    model(**batch).loss.backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got
    assert all("lora_" in name for name in got)


def test_adapters_merge_into_a_sketched_base_and_come_back():
    model, batch = bert()
    model = adapted(model).eval()
    plain = model(**batch).logits
    bs.sketch_(model, RULES)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=3.0)
    with_adapters = model(**batch).logits
    assert not torch.allclose(plain, with_adapters, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(model(**batch).logits, with_adapters, atol=1e-5, rtol=1e-4)
    assert sum(map(is_swapped, model.modules())) > 5
    model.unmerge_adapter()
    torch.testing.assert_close(model(**batch).logits, with_adapters, atol=1e-5, rtol=1e-4)
    merged = bs.restore_(model).merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, with_adapters, atol=1e-5, rtol=1e-4)
