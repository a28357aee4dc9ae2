"""The closed forms: pure functions of tensors and numbers, no ``torch.nn``."""

from backsketch.theory import variance as variance
from backsketch.theory.cost import break_even_extra_variance as break_even_extra_variance
from backsketch.theory.cost import layer_step_cost as layer_step_cost
from backsketch.theory.cost import region_step_cost as region_step_cost
from backsketch.theory.cost import smaller_batch_ratio as smaller_batch_ratio
from backsketch.theory.cost import time_to_target_ratio as time_to_target_ratio
from backsketch.theory.variance import horvitz_thompson as horvitz_thompson
from backsketch.theory.variance import joint_inclusion_systematic as joint_inclusion_systematic
from backsketch.theory.variance import low_rank as low_rank
from backsketch.theory.variance import minimal_sampling as minimal_sampling
from backsketch.theory.variance import systematic as systematic
