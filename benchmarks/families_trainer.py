"""Nine families of transformers through ``transformers.Trainer``: loss curves with and without ``SketchCallback``.

    python benchmarks/families_trainer.py                       # exact, two fixed sketches, and auto
    python benchmarks/families_trainer.py --arm auto --only BERT

writes results/families_trainer.json and .png. The models are those of families.py, with random weights; the data
are made up so that something can be learnt. Arms see the same batches from the same weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import families
import matplotlib
import torch
import transformers as t
from torch import Tensor

from backsketch.integrations.transformers import SketchCallback

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).resolve().parents[1] / "results" / "families_trainer.json"
ARMS = ["exact", "int8", "rows:keep=0.5", "auto"]
STEPS, BATCHES = 32, 8  # batches in an epoch


def made_up(example: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """One row of the shape of ``example``: counting in twos, or a picture that shows its class."""
    if "labels" in example and example["labels"].ndim == 2:
        start = torch.randint(60, (1,), generator=generator)
        ids = (start + 2 * torch.arange(example["labels"].shape[1])) % families.WORDS
        row = {"labels": ids}
        if "input_ids" in example:
            row["input_ids"] = ids
        else:
            shape = example["input_features"].shape[1:]
            row["input_features"] = torch.randn(shape, generator=generator) + start / 30 - 1
        return row
    label = torch.randint(10, (), generator=generator)
    pixels = torch.randn(example["pixel_values"].shape[1:], generator=generator)
    pixels[:, :, label * 6 : label * 6 + 6] += 2
    return {"pixel_values": pixels, "labels": label}


def trained(family: str, sketch: str, batch_size: int) -> dict[str, Any]:
    """A training of one family under one sketch: its losses, and what the callback logged last."""
    build, batch = families.FAMILIES[family]
    torch.manual_seed(0)
    model = build()
    generator = torch.Generator().manual_seed(1)
    example = batch()
    data = [made_up(example, generator) for _ in range(BATCHES * batch_size)]
    callback = None if sketch == "exact" else SketchCallback(sketch, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        args = t.TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=batch_size, learning_rate=1e-3, logging_steps=1,
            lr_scheduler_type="constant", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            log_level="error",
        )  # fmt: skip
        trainer = t.Trainer(
            model, args, train_dataset=data, callbacks=[callback] if callback else []
        )
        trainer.remove_callback(t.PrinterCallback)
        trainer.train()
    history = trainer.state.log_history
    report = callback.report if callback else None
    if report is not None:
        report.measure(model, example)
    last = next((line for line in reversed(history) if "backsketch/arithmetic" in line), {})
    return {
        "loss": [round(line["loss"], 4) for line in history if "loss" in line],
        "logged": {k: v for k, v in last.items() if k.startswith("backsketch/")},
        "sketched": len(report.sketched) if report else 0,
        "share": round(report.arithmetic_share, 3) if report else 0.0,
        "reason": callback.reason if callback else "",
    }


def draw(content: dict[str, Any], out: Path) -> None:
    """All families in one figure, a colour for each arm."""
    found = content["families"]
    colours = dict(zip(ARMS, ["#888888", "#1f77b4", "#d95f02", "#1b9e77"]))
    figure, axes = plt.subplots(3, 3, figsize=(9, 7), layout="constrained")
    for axis, family in zip(axes.flat, families.FAMILIES):
        for arm, result in found.get(family, {}).items():
            width, style = (3.5, "-") if arm == "exact" else (1.2, "--" if arm == "auto" else "-")
            axis.plot(result["loss"], style, color=colours.get(arm), linewidth=width, label=arm)
        axis.set_visible(family in found)
        axis.set_title(family, fontsize=10)
        axis.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("training loss", fontsize=10)
    figure.savefig(out.with_suffix(".png"), dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", action="append", help="exact, a sketch's text or auto")
    parser.add_argument("--only", action="append", choices=families.FAMILIES)
    parser.add_argument("--width", type=int, default=families.WIDTH)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    families.WIDTH = options.width
    content = json.loads(options.out.read_text()) if options.out.exists() else {"families": {}}
    content |= {"width": options.width, "batch": options.batch}
    content["versions"] = {"torch": torch.__version__, "transformers": t.__version__}
    for family in options.only or families.FAMILIES:
        for arm in options.arm or ARMS:
            result = trained(family, arm, options.batch)
            content["families"].setdefault(family, {})[arm] = result
            print(family, arm, result["loss"][0], result["loss"][-1], result["logged"], flush=True)
            options.out.write_text(json.dumps(content, indent=1) + "\n")
    draw(content, options.out)


if __name__ == "__main__":
    main()
