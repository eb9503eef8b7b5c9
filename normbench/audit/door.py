"""From a command to cards: every combination of the swept keys is one layer."""

import itertools
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from rich.console import Console

from normbench.config import Composer, Values
from normbench.plan import write_whole
from normbench.planning import by_key, spellings
from normbench.values import Refused


def run(composer: Composer, master: DictConfig, arguments: Sequence[str]) -> None:
    """Compose every layer that the command names, audit each, print its card; exit 1 where a row failed."""
    parser = OverridesParser.create(config_loader=composer.loader)
    typed = by_key(parser.parse_overrides(list(arguments)), "the command")
    combinations = itertools.product(*map(spellings, typed.values()))
    composed = [composer.compose(list(overrides)) for overrides in combinations]
    for values, _ in composed:
        check(values)

    import torch

    from normbench.audit.card import Card, audit, subject_of
    from normbench.device import use_threads

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
    cards: list[Card] = []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # a layer's own; what matters of them is in the card
        # all can be built before the first is looked at
        subjects = [subject_of(choices["norm"], values["norm"]) for values, choices in composed]
        for (values, choices), subject in zip(composed, subjects, strict=True):
            use_threads(values["threads"])
            card = audit(choices["norm"], subject, backend=values["backend"], with_cost=values["cost"])
            if cards:
                console.print()
            card.print(console)
            cards.append(card)
    target = composed[0][0]["json"]
    if target is not None:
        write_json(target, [card.as_dict() for card in cards])
    if any(card.failed for card in cards):
        sys.exit(1)


def check(values: Values) -> None:
    """What no rule of a single key says."""
    target = values["json"]
    if target is not None:
        path = Path(str(target))
        if not str(target) or path.is_dir():
            raise Refused(f"json={target or repr('')} is no file's name")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise Refused(f"json={target}: {path.parent} cannot be written to")


def write_json(target: str, cards: list[dict[str, object]]) -> None:
    """One card as an object, several as a list."""
    text = json.dumps(cards[0] if len(cards) == 1 else cards, indent=2, ensure_ascii=False)
    write_whole(Path(str(target)), text + "\n")
