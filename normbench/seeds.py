"""Random numbers derived from what they are for, never carried from one use to the next.

Every purpose gets a fresh generator made from a key, so resuming needs no generator state, and workers,
shards and norms cannot shift each other's numbers.
"""

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Seeds:
    """The random numbers of one session: `seed` names the experiment, `session` its repetition.

    Keys in use: ("init", module name), ("order", epoch), ("augment", epoch, step) for resident batches and
    ("augment", epoch, sample) for streamed images, ("forward", epoch, step) for dropout and sampling norms,
    ("split", data set) and ("subset", data set, part) of the seed alone.
    """

    seed: int
    session: int

    def number(self, purpose: str, *key: int | str) -> int:
        """A number below 2**63 that depends on the whole key and on nothing else."""
        text = "/".join(map(str, (self.seed, self.session, purpose, *key)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def generator(self, purpose: str, *key: int | str) -> torch.Generator:
        """A new CPU generator for this purpose; two calls with one key give equal numbers."""
        generator = torch.Generator()
        generator.manual_seed(self.number(purpose, *key))
        return generator
