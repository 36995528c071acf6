"""Learning rate of each step, as the original's trainer (transformers' get_scheduler) has it."""

import math

import optax

from codiemb_jax.config import OptimizerSettings


def learning_rate(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Rate of each step, from 0: rises linearly from 0 during warm-up, then falls to 0 or stays.

    The warm-up is `warmup_steps`, or `warmup_ratio` of all steps, rounded up.
    """
    peak = settings.learning_rate
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = math.ceil(settings.warmup_ratio * steps)
    rest = max(steps - warmup, 1)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[settings.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])
