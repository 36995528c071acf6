"""The plan of the mixed-batch ablation: each device takes its part of a step from a data set of its own."""

from collections.abc import Sequence

import numpy as np

from codiemb_jax.config import DataSettings
from codiemb_jax.data.sampler import Plan, Source, StepPlan
from codiemb_jax.errors import UserError


class MixedPlan(Plan):
    """Deals the batches of all data sets out to devices; what is left of a round is not used."""

    def __init__(self, sources: Sequence[Source], settings: DataSettings, seed: int, devices: int):
        """`devices`: those that hold different rows."""
        self.devices = devices
        super().__init__(sources, settings, seed)
        if not self.steps_per_epoch:
            raise UserError(
                f"sampler: mixed needs a batch for each of the {devices} devices, all data sets together have fewer; "
                "lower data.ir_global_batch_size and data.sts_global_batch_size"
            )

    def step(self, number: int) -> StepPlan:
        """The plan of step `number`, from 0.  Passages are as many for every example, however few an STS pair has."""
        turn, within = divmod(number, self.steps_per_epoch)
        random = self._random(number)
        width = self.settings.positives_per_query + self.settings.negatives_per_query
        parts = []
        for device in range(self.devices):
            source, examples = self.all.batch(turn, within * self.devices + device)
            passages = self._passages(source, examples, random)
            absent = np.full((examples.size, width - passages.shape[1]), -1)
            parts.append((source, examples, np.concatenate([passages, absent], axis=1)))
        return self._step(number, "mixed", parts)
