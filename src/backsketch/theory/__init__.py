"""The closed forms: pure functions of tensors and numbers, no ``torch.nn``.

``docs/theory.md`` states what each proves and which test holds it.
"""

from backsketch.theory import sgd as sgd
from backsketch.theory import variance as variance
from backsketch.theory.advice import effective_batch as effective_batch
from backsketch.theory.advice import learning_rate_factor as learning_rate_factor
from backsketch.theory.break_even import break_even_keep as break_even_keep
from backsketch.theory.break_even import gain_over_smaller_batch as gain_over_smaller_batch
from backsketch.theory.break_even import kappa as kappa
from backsketch.theory.break_even import sampling_multiplier as sampling_multiplier
from backsketch.theory.break_even import unevenness_multiplier as unevenness_multiplier
from backsketch.theory.cost import break_even_extra_variance as break_even_extra_variance
from backsketch.theory.cost import checkpoint_step_cost as checkpoint_step_cost
from backsketch.theory.cost import layer_step_cost as layer_step_cost
from backsketch.theory.cost import projection_step_cost as projection_step_cost
from backsketch.theory.cost import region_step_cost as region_step_cost
from backsketch.theory.cost import smaller_batch_ratio as smaller_batch_ratio
from backsketch.theory.cost import time_to_target_ratio as time_to_target_ratio
from backsketch.theory.growth import Martingale as Martingale
from backsketch.theory.growth import martingale_decomposition as martingale_decomposition
from backsketch.theory.growth import residual_relative_variance as residual_relative_variance
from backsketch.theory.growth import second_moment_growth as second_moment_growth
from backsketch.theory.growth import shared_growth as shared_growth
from backsketch.theory.noise import mean_square as mean_square
from backsketch.theory.noise import noise_scale as noise_scale
from backsketch.theory.noise import noise_scale_at as noise_scale_at
from backsketch.theory.noise import sgd_variance as sgd_variance
from backsketch.theory.steps import noise_floor as noise_floor
from backsketch.theory.steps import steps_to_target as steps_to_target
from backsketch.theory.variance import horvitz_thompson as horvitz_thompson
from backsketch.theory.variance import joint_inclusion_systematic as joint_inclusion_systematic
from backsketch.theory.variance import low_rank as low_rank
from backsketch.theory.variance import minimal_sampling as minimal_sampling
from backsketch.theory.variance import systematic as systematic
