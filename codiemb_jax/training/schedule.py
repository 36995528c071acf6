"""Learning rate schedules as in the trainer of the original implementation (get_scheduler of transformers)."""

import math

import optax

from codiemb_jax.config import OptimizerSettings


def make_schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Creates a schedule that rises linearly from 0 during warmup, then decays to 0 or stays constant.

    The warmup takes `warmup_steps` steps, or `warmup_ratio` of all steps, rounded up.
    """
    peak = settings.learning_rate
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = math.ceil(settings.warmup_ratio * steps)
    decay_steps = max(steps - warmup, 1)
    decay = {
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[settings.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), decay], [warmup])
