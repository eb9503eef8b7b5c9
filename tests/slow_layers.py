"""A layer that holds a session up for as long as a file is there, so that a test can catch it half-way."""

import os
import time
from pathlib import Path

from torch import Tensor, nn


class Slow(nn.BatchNorm2d):
    """Batch norm that takes its time while the file named by SLOW_WHILE exists."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and Path(os.environ.get("SLOW_WHILE", "/nowhere")).exists():
            time.sleep(0.1)
        return super().forward(x)
