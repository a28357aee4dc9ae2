"""A classifier under Lightning, its keeps moved to hold a target for the extra variance."""
# needs: lightning

import lightning.pytorch as pl
import torch
from torch import nn

from backsketch.integrations.lightning import SketchCallback


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 4))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


x = torch.randn(512, 16)
data = torch.utils.data.TensorDataset(x, x[:, :4].argmax(1))
trainer = pl.Trainer(
    max_epochs=3,
    accelerator="cpu",
    callbacks=[SketchCallback("rows:keep=0.5", target_extra_variance=0.05)],
    log_every_n_steps=8,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=64))
for name, value in sorted(trainer.logged_metrics.items()):
    print(f"{name:<30} {float(value):.4g}")
