"""A small GPT-2 under `transformers.Trainer`: exact, and with 8-bit backward products."""
# needs: transformers, accelerate

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from backsketch.integrations.transformers import SketchCallback


def build():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


tokens = torch.cumsum(torch.randint(3, (256, 16)), 1) % 64  # the next one is one of three
data = [{"input_ids": row, "labels": row} for row in tokens]
args = TrainingArguments(
    "out",
    max_steps=20,
    per_device_train_batch_size=32,
    learning_rate=3e-3,
    logging_steps=10,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
)
for callbacks in ([], [SketchCallback("int8")]):
    trainer = Trainer(build(), args, train_dataset=data, callbacks=callbacks)
    trainer.train()
    print([line["loss"] for line in trainer.state.log_history if "loss" in line])
