"""The audit: it catches the reference studies' mistakes, lets honest strangers pass, and says what it saw."""

import json
import os
import subprocess
import sys
from pathlib import Path

import planted
import pytest

from normbench import cli
from normbench.audit.card import Card, audit, subject_of
from normbench.values import Refused

HERE = Path(__file__).parent


def card_of(layer: type | str, **options: object) -> Card:
    target = layer if isinstance(layer, str) else f"planted.{layer.__name__}"
    values = {"_target_": target, "_partial_": True, **options}
    return audit("custom", subject_of("custom", values), backend=None, with_cost=False)


def said(card: Card, check: str) -> str:
    return next(f"{row.status} {row.seen}" for row in card.findings if row.check == check)


# an option, a parameter, evaluation and a value that is wrong; the others in the whole suite
FIRST = ("EarlyReturn", "GateAnew", "EvalByBatchSize", "WrongSign")


@pytest.mark.parametrize(
    "mistake", [pytest.param(m, marks=[] if m in FIRST else pytest.mark.slow) for m in planted.MISTAKES]
)
def test_catches_the_mistakes_of_the_studies(mistake):
    check, words = planted.MISTAKES[mistake]
    card = card_of(mistake)
    row = said(card, check)
    assert card.failed and row.startswith("fail")
    assert any(word in row for word in words.split("|")), row


def test_an_honest_layer_passes_with_its_limits_said():
    card = card_of(planted.Plain)
    assert not card.failed
    warned = [row for row in card.findings if row.status == "warn"]
    assert [row.check for row in warned] == ["ranks"]
    assert "takes 4-d inputs only: (8, 12) ends in ValueError: expected (N, 12, H, W)" in warned[0].seen


def test_says_what_it_saw_of_torchs_own():
    card = card_of("torch.nn.BatchNorm2d")
    assert not card.failed
    assert said(card, "statistics") == (
        "pass training: all positions of all samples; evaluation: earlier batches"
    )
    assert said(card, "options") == "pass eps, momentum, affine, track_running_stats, bias act"
    assert "weight (12,), bias (12,) get gradient and move" in said(card, "parameters")
    assert "takes nn.BatchNorm2d's state" in said(card, "copies")
    assert "within 10 % after" in said(card, "running statistics")
    instance = card_of("torch.nn.InstanceNorm2d")
    assert "all positions of its own sample, in training and evaluation alike" in said(instance, "statistics")
    assert said(instance, "running statistics") == "pass none: evaluation equals training"


@pytest.mark.parametrize(
    ("layer", "check", "words"),
    [
        (planted.Draws, "building", "warn building draws random numbers"),
        (
            planted.Private,
            "copies",
            "warn training changes plain attributes, which no checkpoint holds: seen",
        ),
    ],
)
def test_warns_of_what_is_unusual(layer, check, words):
    card = card_of(layer)
    assert not card.failed
    assert said(card, check).startswith(words)


def test_options_handed_on_to_a_base_are_no_sink():
    values = {"_target_": "planted.Forwards", "_partial_": True, "eps": 1e-3}
    card = audit("custom", subject_of("custom", values), backend=None, with_cost=False)
    assert not card.failed
    assert said(card, "options") == "pass eps act"


def test_warm_up_and_what_comes_after_are_told_apart():
    values = {"_target_": "normbench.norms.mabn.MABN", "_partial_": True}
    card = audit("mabn", subject_of("mabn", values), backend=None, with_cost=False)
    assert said(card, "statistics") == (
        "pass training: all positions of all samples at first, earlier batches later; "
        "evaluation: earlier batches"
    )


def test_a_statistic_held_constant_is_a_warning_not_a_failure():
    card = card_of("normbench.norms.brn.BatchRenorm")
    assert said(card, "gradients").startswith("warn the gradient of the input in training")
    assert "held constant" in said(card, "gradients") and not card.failed


def test_finds_a_width_that_the_layer_takes():
    card = card_of(planted.HalfAGroup)
    assert card.num_features == 64 and not card.failed


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (planted.Unbuildable, "cannot be built: TypeError: .*'secret'"),
        (planted.ForgetsItsInput, r"must keep the shape: \(8, 12, 9, 7\) in, \(8, 756\) out"),
        ("builtins.dict", "cannot be built|must return a torch.nn.Module"),
    ],
)
def test_refuses_what_it_cannot_call(layer, reason):
    with pytest.raises(Refused, match=reason):
        card_of(layer)


def test_an_option_that_acts_only_with_another_is_not_idle():
    values = {"_target_": "normbench.norms.rms.RMSNorm", "_partial_": True, "affine": False}
    card = audit("rms", subject_of("rms", values), backend=None, with_cost=False)
    assert "train_weight with affine=true" in said(card, "options") and not card.failed


def test_leaves_the_generator_alone():
    import torch

    before = torch.get_rng_state()
    subject_of("bn", {"_target_": "normbench.norms.bn.BatchNorm", "_partial_": True}).build()
    card_of(planted.Draws)
    assert torch.equal(before, torch.get_rng_state())


def door(*arguments: str) -> subprocess.CompletedProcess[str]:
    quick = ["cost=false", *([] if any(a.startswith("backend") for a in arguments) else ["backend=null"])]
    command = [sys.executable, "-m", "normbench.audit", *quick, *arguments]
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_the_door_prints_cards_and_writes_them(tmp_path: Path):
    done = door("norm=mbn,bn", "json=cards/two.json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("\npass: ") == 2 and done.stdout.startswith("mbn: normbench.norms.mbn.MBN(12, ")
    cards = json.loads((tmp_path / "cards" / "two.json").read_text())
    assert [card["norm"] for card in cards] == ["mbn", "bn"]
    assert {row["status"] for card in cards for row in card["findings"]} == {"pass"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cards"]


@pytest.mark.slow
def test_the_doors_exit_codes():
    failed = door("norm=custom", "norm._target_=planted.EarlyReturn", "+norm.stride=2")
    assert failed.returncode == 1 and failed.stderr == ""
    assert " fail  options " in failed.stdout and "stride: no other value changes anything" in failed.stdout
    refused = door("norm=custom", "norm._target_=planted.Unbuildable")
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1
    assert "normbench audit: norm=custom cannot be built: TypeError" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["norm=mbnn"], "norm=mbnn: no such norm; did you mean 'mbn'?"),
        (["norm=bn", "stride=2"], "stride=2: norm=bn has no stride; use "),
        (["norm.epss=1"], "unknown key 'norm.epss'; did you mean 'norm.eps'?"),
        (["norm.eps=-1"], "norm.eps must be a number ≥ 0, got -1"),
        (["backend=indctor"], "backend must be one of aot_eager, inductor, got 'indctor'; did you mean"),
        (["json=."], "json=. is no file's name"),
        (["json=/proc/none/card.json"], "/proc/none: "),
        (
            ["norm=gn", "norm.num_groups=4,7"],
            "norm=gn cannot be built: ValueError: num_groups=7 does not divide",
        ),
        (
            ["norm=custom", "norm._target_=no_such.Layer"],
            "no_such.Layer: ModuleNotFoundError: No module named",
        ),
        (["study=mbn_stride"], "unknown key 'study'"),
        (["norm=custom"], "norm=custom needs the layer's class: norm._target_=my_package.MyNorm"),
    ],
)
def test_slips_are_one_line(arguments, line, monkeypatch, capsys):
    """In this process: what the command's own exit codes are, the test above asks of a real one."""
    monkeypatch.setattr(sys, "argv", ["audit", "cost=false", "backend=null", *arguments])
    if any(argument.startswith("backend") for argument in arguments):
        sys.argv.remove("backend=null")
    with pytest.raises(SystemExit) as ended:
        cli.run("audit")
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert err.startswith(f"normbench audit: {line}") and err.count("\n") == 1
