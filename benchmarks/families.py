"""Nine families of transformers with random weights: what a class swap and what a captured graph reach.

``python benchmarks/families.py`` writes results/families.json and ``python benchmarks/families.py --capture``
results/captured.json, from which the tables of docs/families.md are made.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

import backsketch as bs
from backsketch.regions import state_of

OUT = Path(__file__).resolve().parents[1] / "results" / "families.json"
BATCH, TOKENS, WORDS = 4, 64, 512
WIDTH = 128  # of the first stage, where there are several; heads have 32 columns
TEXT = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def sizes() -> dict[str, int]:
    """Of an encoder, as most configurations call them."""
    return {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": WIDTH // 32,
        "intermediate_size": 4 * WIDTH,
    }  # fmt: skip


def decoder_sizes() -> dict[str, int]:
    return {**sizes(), "num_key_value_heads": WIDTH // 64, "max_position_embeddings": 128}


def tokens() -> Tensor:
    return torch.randint(WORDS, (BATCH, TOKENS))


def text() -> dict[str, Tensor]:
    ids = tokens()
    return {"input_ids": ids, "labels": ids}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 64, 64), "labels": torch.randint(10, (BATCH,))}


def speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(BATCH, 80, 128), "labels": tokens()}


def whisper() -> nn.Module:
    config = t.WhisperConfig(
        **TEXT, decoder_start_token_id=1, d_model=WIDTH, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=WIDTH // 32, decoder_attention_heads=WIDTH // 32,
        encoder_ffn_dim=4 * WIDTH, decoder_ffn_dim=4 * WIDTH,
        max_source_positions=64, max_target_positions=TOKENS,
    )  # fmt: skip
    return t.WhisperForConditionalGeneration(config)


def t5() -> nn.Module:
    config = t.T5Config(
        **TEXT,
        d_model=WIDTH,
        d_kv=32,
        d_ff=4 * WIDTH,
        num_layers=2,
        num_heads=WIDTH // 32,
        decoder_start_token_id=0,
    )
    return t.T5ForConditionalGeneration(config)


def swin() -> nn.Module:
    config = t.SwinConfig(
        image_size=64, patch_size=4, embed_dim=WIDTH, depths=[2, 2],
        num_heads=[WIDTH // 32, WIDTH // 16], window_size=4,
        num_labels=10,
    )  # fmt: skip
    return t.SwinForImageClassification(config)


def convnext() -> nn.Module:
    config = t.ConvNextConfig(
        image_size=64, hidden_sizes=[WIDTH, 2 * WIDTH], depths=[2, 2], num_stages=2, num_labels=10
    )
    return t.ConvNextForImageClassification(config)


def gpt2() -> nn.Module:
    config = t.GPT2Config(**TEXT, n_embd=WIDTH, n_layer=2, n_head=WIDTH // 32, n_positions=TOKENS)
    return t.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    return t.ViTForImageClassification(
        t.ViTConfig(**sizes(), image_size=64, patch_size=8, num_labels=10)
    )


def mixtral() -> nn.Module:
    config = t.MixtralConfig(**TEXT, **decoder_sizes(), num_local_experts=4, num_experts_per_tok=2)
    return t.MixtralForCausalLM(config)


Case = tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]
FAMILIES: dict[str, Case] = {
    "BERT": (lambda: t.BertForMaskedLM(t.BertConfig(**sizes(), vocab_size=WORDS)), text),
    "GPT-2": (gpt2, text),
    "Llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT, **decoder_sizes())), text),
    "ViT": (vit, pictures),
    "Swin": (swin, pictures),
    "ConvNeXt": (convnext, pictures),
    "T5": (t5, text),
    "Whisper": (whisper, speech),
    "Mixtral": (mixtral, text),
}


def reached(family: str, sketch: bs.Estimator) -> dict[str, Any]:
    """What a class swap reaches in one family."""
    build, batch = FAMILIES[family]
    torch.manual_seed(0)
    model = build().train()
    model.config.use_cache = False
    report = bs.sketch_(model, sketch)
    report.measure(model, batch())
    assert report.arithmetic is not None
    total, counted = report.arithmetic.total, report.arithmetic.modules
    rest: dict[str, float] = {}
    for site in report.exact:
        what = f"{site.type}: {site.reason}"
        rest[what] = rest.get(what, 0.0) + counted.get(site.name, 0) / total
    rest["in functions, such as attention's own products"] = 1 - sum(counted.values()) / total
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "sites": len(report.sites),
        "sketched": len(report.sketched),
        "share": round(report.arithmetic_share, 4),
        "exact": {what: round(part, 4) for what, part in rest.items() if part >= 5e-4},
    }


def built(family: str, **config: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    build, batch = FAMILIES[family]
    torch.manual_seed(0)
    model = build().train()
    for name, value in config.items():
        setattr(model.config, name, value)
    return model, batch()


def captured(family: str) -> dict[str, Any]:
    """What one region around a whole model reaches, its loss included, and how many blocks are regions."""
    model, batch = built(family)
    before = bs.saved_bytes(model, batch).total
    bs.sketch_(model, bs.Int8(save=True))
    swapped = bs.saved_bytes(model, batch).total
    bs.restore_(model)
    bs.sketch_(model, bs.Region(keep=1.0, arithmetic="int8", save="int8"))
    model(**batch).loss.backward()
    state = state_of(model)
    share = re.search(r"(\d+)% of its backward products", state.note)
    return {
        "status": state.status,
        "share": int(share[1]) / 100 if share else 0.0,
        "note": state.note or state.reason,
        "saved_by_swap": round(swapped / before, 3),
        "saved": round(bs.saved_bytes(model, batch).total / before, 3),
        "blocks": blocks(family),
    }


def blocks(family: str) -> dict[str, Any]:
    """Regions of half the samples around the blocks of a model, ``use_cache`` at its default."""
    model, batch = built(family)
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    inner = {name for name in lists if any(name.startswith(f"{other}.") for other in lists)}
    rules = {f"{name}.*": bs.Region(keep=0.5) for name in lists if name not in inner}
    bs.sketch_(model, rules)
    for _ in range(2):
        model(**batch).loss.backward()
    states = [state_of(m) for m in model.modules() if hasattr(m, "_backsketch")]
    return {
        "active": sum(s.status == "active" for s in states),
        "all": len(states),
        "reasons": sorted({s.reason for s in states if s.reason}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sketch", default="rows:keep=0.5")
    parser.add_argument(
        "--capture", action="store_true", help="regions in the place of a class swap"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(FAMILIES))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.out = options.out or OUT.with_stem("captured" if options.capture else OUT.stem)
    sketch = "regions" if options.capture else options.sketch
    versions = {"torch": torch.__version__, "transformers": t.__version__}
    found = json.loads(options.out.read_text())["families"] if options.out.exists() else {}
    for family in options.only:
        found[family] = (
            captured(family) if options.capture else reached(family, bs.parse(options.sketch))
        )
        print(f"{family:<10}", json.dumps(found[family]), flush=True)
        content = {"sketch": sketch, "versions": versions, "families": found}
        options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
