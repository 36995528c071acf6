"""Plans in which row, of which device, each text of a batch lies, as a pure function of the texts' lengths."""

from dataclasses import dataclass

import numpy as np

from codiemb_jax.text.rows import pack, padded_count, padded_length, whole_chunks

TOKENS_PER_SLOT = 16
"""Row length divided by the maximum number of texts per packed row."""


@dataclass(frozen=True)
class BatchLayout:
    """Where the texts of a batch lie. Devices have equal consecutive parts of the examples, and equally many rows."""

    order: np.ndarray
    """int [examples]: the examples in the order of their devices"""
    text_rows: np.ndarray
    """int [examples, texts]: the row, on its device, of each text of the ordered examples; -1 for padding"""
    row_length: int
    """Number of tokens per row, including padding."""
    rows: int
    """Number of rows per device."""
    slots: int
    """Maximum number of texts per row."""
    devices: int
    """Number of parts of the batch."""


@dataclass(frozen=True)
class PaddedLayout:
    """Puts each text into a row of its own. The examples keep their order."""

    devices: int = 1
    """Number of devices along the data and fsdp axes of the mesh."""
    multiple: int = 1
    """Row lengths are multiples of this."""

    def __call__(self, lengths: np.ndarray, limit: int, group_size: int | None) -> BatchLayout:
        """Lays out a batch.

        Args:
          lengths: int [examples, texts], the number of tokens of each query and its passages; 0 for padding.
          limit: Maximum number of tokens of a text.
          group_size: Number of consecutive examples that are compared; None for the whole batch. Not used.
        """
        examples, texts = lengths.shape
        per_device = examples // self.devices
        # Queries come first, then passages.
        first = np.arange(per_device)[:, None]
        passages = np.arange(per_device, per_device * texts).reshape(per_device, texts - 1)
        text_rows = np.tile(np.concatenate([first, passages], axis=1), (self.devices, 1))
        return BatchLayout(
            order=np.arange(examples),
            text_rows=np.where(lengths > 0, text_rows, -1),
            row_length=-(-padded_length(int(lengths.max()), limit) // self.multiple) * self.multiple,
            rows=per_device * texts,
            slots=1,
            devices=self.devices,
        )


@dataclass(frozen=True)
class PackedLayout:
    """Packs several texts into each row, and balances the devices by tokens."""

    row_length: int
    """Number of tokens per row."""
    devices: int = 1
    """Number of devices along the data and fsdp axes of the mesh."""
    chunks: int = 1
    """Maximum number of chunks in which a device encodes its rows; the number of rows is a multiple of a chunk's."""

    def __call__(self, lengths: np.ndarray, limit: int, group_size: int | None) -> BatchLayout:
        """Lays out a batch.

        Args:
          lengths: int [examples, texts], the number of tokens of each query and its passages; 0 for padding.
          limit: Maximum number of tokens of a text. Not used.
          group_size: Number of consecutive examples that are compared; None for the whole batch. The examples of a
            group stay together.
        """
        slots = max(1, self.row_length // TOKENS_PER_SLOT)
        order = balanced_order(lengths.sum(axis=1), self.devices, group_size)
        lengths = lengths[order]
        text_rows = np.full(lengths.shape, -1)
        for rows, part in zip(np.split(text_rows, self.devices), np.split(lengths, self.devices), strict=True):
            rows[part > 0] = pack(part[part > 0], self.row_length, slots)
        return BatchLayout(
            order=order,
            text_rows=text_rows,
            row_length=self.row_length,
            rows=whole_chunks(padded_count(int(text_rows.max()) + 1), self.chunks),
            slots=slots,
            devices=self.devices,
        )


Layout = PaddedLayout | PackedLayout


def balanced_order(tokens: np.ndarray, devices: int, group_size: int | None) -> np.ndarray:
    """Orders the examples of a batch so that its equal consecutive parts, one per device, have similar token counts.

    Groups that fit on a device stay consecutive. Larger groups stay on the same devices.

    Args:
      tokens: int [examples], the number of tokens of each example.
      devices: Number of parts.
      group_size: Number of examples per group; None for the whole batch.

    Returns:
      Indices of the examples in their new order, int [examples].
    """
    per_device = tokens.size // devices
    groups = np.arange(tokens.size).reshape(-1, group_size or tokens.size)
    if groups.shape[1] < per_device and per_device % groups.shape[1] == 0:  # several groups per device
        return groups[_deal(tokens[groups].sum(axis=1), devices)].ravel()
    if groups.shape[1] % per_device == 0:  # one or several devices per group
        return np.concatenate([group[_deal(tokens[group], group.size // per_device)] for group in groups])
    return np.arange(tokens.size)


def _deal(tokens: np.ndarray, devices: int) -> np.ndarray:
    """Returns an order of items in which `devices` equal parts have similar sums. On one device they keep their order.

    The items are dealt in rounds, the largest first; in each round, the device with the fewest tokens gets the most.
    """
    if devices == 1:  # in a mixed step, the examples of a device can have groups of their own
        return np.arange(tokens.size)
    totals = np.zeros(devices, np.int64)
    parts = []
    for items in np.argsort(-tokens, kind="stable").reshape(-1, devices):
        part = np.empty(devices, np.int64)
        part[np.argsort(totals, kind="stable")] = items
        totals += tokens[part]
        parts.append(part)
    return np.stack(parts, axis=1).ravel()
