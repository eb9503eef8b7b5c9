"""TensorBoard scalars of a session: every number of epochs.csv against the step."""

import math
from pathlib import Path
from typing import Any

from normbench.results import EpochRow

NAMES = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "test_loss": "loss/test",
    "train_acc": "acc/train",
    "val_acc": "acc/val",
    "test_acc": "acc/test",
    "lr": "lr",
    "epoch_time_s": "time/epoch_s",
    "images_per_s": "time/images_per_s",
}


class Scalars:
    """Writes rows as scalars into `folder`; does nothing for None. A row is on disk when `write` returns."""

    def __init__(self, folder: Path | None) -> None:
        self.writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # dear to import, so only where wanted

            for old in folder.glob("events.*"):
                old.unlink()
            self.writer = SummaryWriter(str(folder))

    def write(self, row: EpochRow) -> None:
        """Every finite number of the row."""
        if self.writer is None:
            return
        for column, tag in NAMES.items():
            value = getattr(row, column)
            if value is not None and math.isfinite(value):
                self.writer.add_scalar(tag, value, row.step)
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()
