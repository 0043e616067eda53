"""Columns that are read once for every row of a data set, and handed out batch by batch."""

from __future__ import annotations

import torch

from rlhfkernels.data.batch import Batch


class PreparedColumns:
    """Columns of a whole data set.

    Args:
        num_rows: data rows of the data set.

    Attributes:
        columns: by name, with as many entries for a data row as a batch's column has.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self.columns: dict[str, torch.Tensor] = {}

    def keep(self, name: str, batch: Batch) -> None:
        """Copies a column of ``batch`` to its rows of the data set's."""
        column = batch[name]
        if name not in self.columns:
            num_entries = self._num_rows * (len(column) // batch.num_rows)
            self.columns[name] = column.new_zeros(num_entries, *column.shape[1:])
        self.columns[name][self._entries(name, batch)] = column

    def fill(self, batch: Batch) -> None:
        """Gives ``batch`` the entries of its rows in every column."""
        for name, column in self.columns.items():
            batch[name] = column[self._entries(name, batch)]

    def _entries(self, name: str, batch: Batch) -> torch.Tensor:
        """Places of a batch's entries in a column, on its device, in a copy that the phase does not wait for."""
        assert batch.rows is not None, "the rows of a data set have places"
        column = self.columns[name]
        count = len(column) // self._num_rows
        index = torch.tensor([row * count + i for row in batch.rows for i in range(count)])
        return index.to(column.device, non_blocking=True)
