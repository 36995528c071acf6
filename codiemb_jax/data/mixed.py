"""Plan of the mixed-batch ablation, in which each device draws its examples of a step from a single dataset."""

from collections.abc import Sequence

import numpy as np

from codiemb_jax.config import DataSettings
from codiemb_jax.data.layout import Layout
from codiemb_jax.data.sampler import Plan, Source, StepPlan
from codiemb_jax.errors import UserError


class MixedPlan(Plan):
    """Deals the batches of all datasets to the devices and drops the remainder of each round."""

    def __init__(
        self,
        sources: Sequence[Source],
        settings: DataSettings,
        seed: int,
        layout: Layout,
        compare_texts: bool = False,
    ):
        """Creates the plan.

        Args:
          sources: The datasets.
          settings: The data settings.
          seed: The seed of the run.
          layout: Lays out the texts of a batch.
          compare_texts: Whether to find passages of IR examples that have the same text.

        Raises:
          UserError: If there are too few examples for a step.
        """
        self.parts = layout.devices
        super().__init__(sources, settings, seed, layout, {}, compare_texts)
        if not self.steps_per_epoch:
            raise UserError(
                f"sampler: mixed needs one batch per device ({self.parts}), but the data has fewer; "
                "lower data.ir_global_batch_size and data.sts_global_batch_size"
            )

    def step(self, number: int) -> StepPlan:
        """Returns the plan of step `number`, from 0. STS pairs are padded to the number of passages of IR examples."""
        epoch, step = divmod(number, self.steps_per_epoch)
        rng = self._rng(number)
        width = self.settings.positives_per_query + self.settings.negatives_per_query
        parts = []
        for device in range(self.parts):
            source, examples = self._draw(self.all, epoch, step * self.parts + device)
            passages = self._passages(source, examples, rng)
            padding = np.full((examples.size, width - passages.shape[1]), -1)
            parts.append((source, examples, np.concatenate([passages, padding], axis=1)))
        return self._step(number, "mixed", parts)
