"""Training of reference models, exact and sketched: the engine behind `backsketch train`.

Needs the extra `backsketch[train]`. Nothing of it is imported by `import backsketch`.
"""

from __future__ import annotations

from backsketch.train.config import RECIPES as RECIPES
from backsketch.train.config import Recipe as Recipe
from backsketch.train.config import TrainConfig as TrainConfig
from backsketch.train.errors import Interrupted as Interrupted
from backsketch.train.errors import TrainError as TrainError
from backsketch.train.images import ImageData as ImageData
from backsketch.train.load import load_data as load_data
from backsketch.train.run import train as train
from backsketch.train.tasks import data_of as data_of
from backsketch.train.text import TextData as TextData
