"""Configuration: every study composes, every typo is refused in one line that names the cure."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import STUDIES, Planner

from normbench.config import conf_dir, flatten
from normbench.identity import identify, short_names
from normbench.plan import Plan
from normbench.values import Refused

TYPOS = {
    "epoch=3": "unknown key 'epoch'; did you mean 'epochs'?",
    "norm=mnb": "norm=mnb: no such norm; did you mean 'mbn'?",
    "model=resnet": "did you mean 'resnet9'?",
    "nrom=obn": "unknown key 'nrom'; did you mean 'norm'?",
    "study=mbn_strides": "did you mean 'mbn_stride'?",
    "optim/schedule=cosin": "did you mean 'cosine'?",
    "norm.momentun=0.1": "unknown key 'norm.momentun'; did you mean 'norm.momentum'?",
    "+norm.strid=2": "unknown key 'norm.strid'",
    "+foo=1": "unknown key 'foo'",
    "++optim.learning_rate=1": "unknown key 'optim.learning_rate'",
    "~norm.eps": "norm.eps was deleted",
    "stride=4": "stride=4: norm=obn has no stride; use mbn",
    "norm=mbn stride=0": "stride must be an int ≥ 1, got 0",
    "norm=mbn stride=abc": "stride must be an int ≥ 1, got 'abc'",
    "norm=mbn stride=4.7": "stride must be an int ≥ 1, got 4.7",
    "norm=mbn stride=1 norm.stride=8": "stride=1 contradicts norm.stride=8",
    "norm=obn,mbn stride=1,2": "norm=obn has no stride",
    "norm.stride=2": "norm.stride: the chosen norm has no such key; norm=mbn,mbn_batch,",
    "norm=obn norm=mbn": "norm is given twice",
    "epochs=0": "epochs must be an int ≥ 1, got 0",
    "epochs=2.5": "epochs must be an int ≥ 1, got 2.5",
    "steps=10 epochs=2": "epochs=2 and steps=10 exclude each other",
    "epochs=null": "epochs=null and steps=null",
    "optim.lr=-0.1": "optim.lr must be a number > 0, got -0.1",
    "optim.lr=fast": "optim.lr must be a number > 0, got 'fast'",
    "optim.momentum=1": "optim.momentum must be a number ≥ 0 and < 1, got 1",
    "optim.momentum=0": "optim.nesterov=true needs optim.momentum > 0",
    "optim.nesterov=maybe": "optim.nesterov must be true or false",
    "optim.name=adam": "choose with optim=",
    "norm._target_=torch.nn.BatchNorm2d": "choose with norm=",
    "precision=fp8": "precision must be one of fp32, bf16, fp16, got 'fp8'",
    "device=gpu": "device must be auto, cpu, cuda or cuda:N, got 'gpu'",
    "select=best_test": "select must be one of last, best_val",
    "select=best_val": "select=best_val needs a held-out part",
    "eval_every=often": "eval_every must be a count ≥ 1 of epochs or steps",
    "batch.size=0": "batch.size must be an int ≥ 1, got 0",
    "batch.size=2000 dataset.drop_last=true": "batch.size=2000 is larger than the 1437 training samples",
    "dataset.val_fraction=2": "dataset.val_fraction must be a number ≥ 0 and < 1, got 2",
    "dataset.augment.flip=-1": "dataset.augment.flip must be a number from 0 to 1, got -1",
    "dataset.train_subset=9999": "dataset.train_subset",
    "model.dropout=1.5": "model.dropout must be a number ≥ 0 and < 1, got 1.5",
    "session=-1": "session must be an int ≥ 0, got -1",
    "session=1,1": "session has a value twice: 1, 1",
    "session=two": "session must be an int ≥ 0, got 'two'",
    "norm=custom": "norm=custom needs the layer's class: norm._target_=",
    "fidelity=as_run": "study=adhoc has none of this name",
    "study=mbn_stride norm=obn": "norm: set by the arms of study=mbn_stride",
    "study=mbn_stride stride=2": "stride: set by the arms of study=mbn_stride",
    "study=mbn_stride norm.stride=2": "norm=mbn,mbn_batch,mbn_random,mbn_rows has it",
    "study=mbn_stride fidelity=asrun": "did you mean 'as_run'?",
    "study=mbn_stride,mbn_r9": "study cannot be swept",
    "threads=1,2": "threads changes no result, so it makes no arms; give one value",
    "norm=../../x": "no such norm",
    "plan.last=3": "plan.last is filled in by normbench",
    "session=range(0)": "session has no value",
    "++hydra.mode=RUN": "normbench plans its sessions and their folders itself",
    "hydra.sweep.dir=zz": "normbench plans its sessions and their folders itself",
    "optim.schedule=cosine": "choose a group's option with /, like optim/schedule=cosine",
    "optim.schedule.warmup=0.9": "optim.schedule.warmup must be > 0 and ≤ 0.5",
    "study.name=../evil": "study.name must be a word that can name a folder",
    "norm=MNB": "did you mean 'mbn'?",
    "model.norm_layers=[prep.norm,prep.norm]": "norm_layers names a layer twice",
    "out=/dev/null": "Not a directory",
    "norm=gn norm.num_groups=0": "norm.num_groups must be an int ≥ 1, got 0",
    "norm=gn norm.num_groups=two": "norm.num_groups must be an int ≥ 1, got 'two'",
}


@pytest.mark.parametrize("command", TYPOS, ids=list(TYPOS))
def test_a_typo_is_refused_in_one_line_naming_the_cure(
    command: str, refusal: Callable[[str], str], tmp_path: Path
) -> None:
    line = refusal(command)
    assert TYPOS[command] in line
    assert "\n" not in line.strip()
    assert not list(tmp_path.iterdir())


def test_options_may_stand_between_overrides(plan_of: Planner) -> None:
    assert len(plan_of("epochs=1", "-m", "norm=obn,mbn").arms) == 2


@pytest.mark.parametrize("command", ["epoch=3", "norm=mnb", "norm=mbn stride=0"])
def test_a_typo_answers_with_exit_code_2_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "normbench.train", *command.split()],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert time.perf_counter() - began < 60
    assert " torch\n" not in done.stderr and "| torch" not in done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time")]
    assert len(said) == 1 and said[0].startswith("normbench train: "), said
    assert done.stdout == ""


def test_help_lists_every_choice_without_torch(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([sys.executable, "-m", "normbench.train", "--help"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0
    assert "| torch\n" not in done.stderr
    for group in ("norm", "model", "dataset", "batch", "optim", "study"):
        for option in (conf_dir() / group).glob("*.yaml"):
            assert option.stem in done.stdout


def test_yaml_typos_in_a_users_study_are_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "study"
    folder.mkdir(parents=True)
    (folder / "slip.yaml").write_text("# @package _global_\nepoch: 10\nstudy: {name: slip}\n")
    (folder / "inner.yaml").write_text("# @package _global_\nnorm: {momentun: 0.2}\nstudy: {name: inner}\n")
    (folder / "kind.yaml").write_text("# @package _global_\nepochs: ten\nstudy: {name: kind}\n")
    (folder / "arms.yaml").write_text("# @package _global_\nstudy: {name: arms, arm: [norm=obn]}\n")
    at = ["--config-dir", str(tmp_path / "mine")]
    assert "unknown key 'epoch'; did you mean 'epochs'?" in refusal("study=slip", *at)
    assert "unknown key 'norm.momentun'; did you mean 'norm.momentum'?" in refusal("study=inner", *at)
    assert "epochs must be an int ≥ 1, got 'ten'" in refusal("study=kind", *at)
    assert "unknown key 'study.arm'; did you mean 'study.arms'?" in refusal("study=arms", *at)


MISTAKEN_STUDIES = {
    "arms: ['norm=obn session=5']": "sets session, which belongs to the study or the command",
    "arms: ['norm=obn norm=mbn']": "norm is given twice in the arm 'norm=obn norm=mbn'",
    "arms: ['norm=obn study=mbn_r9']": "sets study, which belongs",
    "arms: ['norm=obn out=x']": "sets out, which belongs",
    "arms: []": "study.arms must be a list of override strings",
    "arms: [1]": "study.arms must be a list of override strings",
    "arms: 'norm=obn'": "study.arms must be a list of override strings",
    "arms: ['norm=obn \"oops']": "cannot be read",
    "arms: ['norm=obm']": "did you mean 'obn'?",
    "sessions: 0": "study.sessions must be an int ≥ 1, got 0",
    "sessions: many": "study.sessions must be an int ≥ 1, got 'many'",
    "name: mbn_r9": "the study is called slip, as its file is",
    "fidelities: {correct: null}": "study.fidelities.correct must be a mapping",
    "fidelities: {correct: {override: ['norm=bn']}}": "; did you mean 'overrides'?",
    "fidelities: {correct: {armz: ['norm=bn']}}": "did you mean 'arms'?",
    "arms: [": "not valid YAML",
}


@pytest.mark.parametrize("slip", MISTAKEN_STUDIES, ids=list(MISTAKEN_STUDIES))
def test_a_mistaken_study_is_refused_in_one_line(
    refusal: Callable[..., str], tmp_path: Path, slip: str
) -> None:
    (tmp_path / "mine" / "study").mkdir(parents=True)
    (tmp_path / "mine" / "study" / "slip.yaml").write_text(f"# @package _global_\nstudy: {{{slip}}}\n")
    line = refusal("study=slip", "--config-dir", "mine")
    assert MISTAKEN_STUDIES[slip] in line and line.count("\n") == 1


MISTAKEN_GROUPS = {
    (
        "optim",
        "{defaults: [{schedule: step}], name: sgd, nesterovv: true}",
    ): "unknown key 'optim.nesterovv'; did you mean 'optim.nesterov'?",
    (
        "optim",
        "{defaults: [{schedule: step}], name: rmsprop}",
    ): "optim.name must be one of adam, adamw, sgd, got 'rmsprop'",
    ("optim", "{name: sgd, lr: 0.1}"): "optim/schedule is not chosen; add it to the defaults of optim=own",
    ("optim/schedule", "{name: one_cycle, strat: 0.1}"): "did you mean 'optim.schedule.start'?",
    ("batch", "{sise: 24}"): "did you mean 'batch.size'?",
    ("norm", "{_target_: normbench.norms.bn.BatchNorm}"): "needs _partial_: true",
}


@pytest.mark.parametrize("group, text", MISTAKEN_GROUPS, ids=[str(i) for i in range(len(MISTAKEN_GROUPS))])
def test_a_mistaken_file_of_ones_own_is_refused(
    refusal: Callable[..., str], tmp_path: Path, group: str, text: str
) -> None:
    (tmp_path / "mine" / group).mkdir(parents=True)
    (tmp_path / "mine" / group / "own.yaml").write_text(text)
    line = refusal(f"{group}=own", "--config-dir", "mine")
    assert MISTAKEN_GROUPS[group, text] in line and line.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_every_study_composes_in_every_fidelity(study: str, plan_of: Planner) -> None:
    written = yaml.safe_load((conf_dir() / "study" / f"{study}.yaml").read_text())["study"]
    names = list(written.get("fidelities") or {})
    plan = plan_of(f"study={study}", *([f"fidelity={','.join(names)}"] if names else []))
    assert plan.study == study == written["name"]
    assert len(plan.sessions) == len(plan.arms) * written["sessions"]
    assert len(plan.arms) >= 2 + (len(names) > 1)


def test_fidelities_change_what_runs(plan_of: Planner) -> None:
    as_run = plan_of("study=mbn_r9", "fidelity=as_run")
    correct = plan_of("study=mbn_r9")
    assert [a.choices["norm"] for a in as_run.arms] == ["obn", "torch_bn"]
    assert [a.values["norm"]["eps"] for a in as_run.arms] == [1e-5, 1e-3], "the study's own confound"
    assert [a.choices["norm"] for a in correct.arms] == ["obn", "mbn"]
    both = plan_of("study=mbn_r9", "fidelity=as_run,correct")
    assert len(both.arms) == 4


def test_the_command_line_wins_over_the_study(plan_of: Planner) -> None:
    plan = plan_of("study=mbn_stride", "session=0,3", "steps=7", "optim.lr=0.05")
    assert {s.session for s in plan.sessions} == {0, 3}
    lengths = {(a.values["steps"], a.values["epochs"], a.values["optim"]["lr"]) for a in plan.arms}
    assert lengths == {(7, None, 0.05)}
    assert [a.values["norm"].get("stride") for a in plan.arms] == [None, 1, 2, 4, 8]


def same(*plans: Plan) -> bool:
    return len({plan.arms[0].setting for plan in plans}) == 1


@pytest.mark.slow
def test_one_setting_has_one_name_however_it_is_written(plan_of: Planner) -> None:
    assert same(plan_of("batch=bs16"), plan_of("batch.size=16"))
    assert same(plan_of("norm=mbn", "stride=4"), plan_of("norm=mbn", "norm.stride=4"))
    assert same(plan_of(), plan_of("threads=1"), plan_of("seed=3"), plan_of("session=2"), plan_of("out=x"))
    assert same(plan_of("optim.lr=1"), plan_of("optim.lr=1.0"))
    assert same(plan_of("eval_every=1"), plan_of("eval_every=1epochs"), plan_of("eval_every='1 epoch'"))
    assert same(plan_of("device=cuda"), plan_of("device=cuda:1"))
    assert not same(plan_of("norm=obn"), plan_of("norm=torch_bn"))
    assert not same(plan_of("norm=mbn"), plan_of("norm=mbn", "stride=2"))
    assert not same(plan_of(), plan_of("optim.lr=0.2"))
    assert not same(plan_of(), plan_of("compile=true"))


def test_a_setting_keeps_its_name_when_a_null_or_false_key_is_added(plan_of: Planner) -> None:
    arm = plan_of("norm=mbn", "stride=4").arms[0]
    later = {**arm.values, "invented": None, "also_invented": False}
    assert identify(later, arm.choices, arm.values, arm.choices).hash == arm.config_hash


def test_a_setting_keeps_its_name_when_a_key_with_a_worded_default_is_added(plan_of: Planner) -> None:
    recorded = plan_of("norm=mbn", "stride=4", "norm.impl=reference").arms[0]
    assert recorded.config_hash == "4c38c049d3", "as before norm.sample was there, and before impl=auto"
    bn = plan_of("norm=bn", "steps=1", "model.width=4").arms[0]
    assert bn.config_hash == "df46808589", "as before norm.impl was there"
    rows = plan_of("norm=mbn", "stride=4", "norm.sample=rows").arms[0]
    assert rows.config_hash != recorded.config_hash
    assert rows.arm == "mbn-stride4-samplerows-resnet9-digits"
    assert plan_of("norm=mbn_rows", "norm.sample=stride").arms[0].arm.startswith("mbn_rows-samplestride-")


def test_a_readable_id_says_what_differs(plan_of: Planner) -> None:
    arm = plan_of("norm=mbn", "stride=4", "optim.lr=0.2", "batch=bs16").arms[0]
    assert arm.arm == "mbn-stride4-resnet9-digits-bs16-lr0.2"
    assert plan_of("optim=adam", "optim/schedule=step").arms[0].arm == "obn-resnet9-digits-adam-step"
    assert plan_of("norm=bin", "norm.train_gate=false").arms[0].arm == "bin-no_train_gate-resnet9-digits"


def labels(plan: Plan) -> list[str]:
    return list(short_names({arm.setting: arm.arm for arm in plan.arms}).values())


def test_arms_are_called_by_what_tells_them_apart(plan_of: Planner) -> None:
    strides = ["mbn", "mbn-stride2", "mbn-stride4", "mbn-stride8"]
    assert labels(plan_of("study=mbn_stride")) == ["obn", *strides]
    assert labels(plan_of("optim.lr=1e-5,1e-6")) == ["obn-lr1e_05", "obn-lr1e_06"]
    assert labels(plan_of("norm=bin", "norm.train_gate=true,false")) == ["bin", "bin-no_train_gate"]
    assert labels(plan_of("study=d2l_lenet", "fidelity=as_run")) == [
        "bn-momentum0.9-stored_varbiased", "torch_bn", "nn"]  # fmt: skip


def test_long_ids_stay_apart_and_fit_a_file_name(plan_of: Planner) -> None:
    layers = ",".join(f"res{i}{side}.norm" for i in (1, 2) for side in "ab")
    plan = plan_of(
        f"model.norm_layers=[prep.norm,layer1.norm,{layers},layer2.norm,layer3.norm]",
        "optim.label_smoothing=0.123456789,0.987654321",
        "optim.schedule.start=0.123456789",
        "dataset.augment.cutout_p=0.123456789",
        "norm=custom",
        "norm._target_=torch.nn.BatchNorm2d",
    )
    first, second = (arm.setting for arm in plan.arms)
    assert plan.arms[0].arm != plan.arms[1].arm and max(len(first), len(second)) < 200


def test_plans_interleave_arms_and_shuffle_them_within_a_session(plan_of: Planner) -> None:
    plan = plan_of("norm=obn,mbn,bn", "session=range(30)")
    assert [s.launch_order for s in plan.sessions] == list(range(90))
    rounds = [plan.sessions[i : i + 3] for i in range(0, 90, 3)]
    assert all({s.session for s in r} == {i} for i, r in enumerate(rounds))
    assert all({s.arm for s in r} == {0, 1, 2} for r in rounds)
    assert len({tuple(s.arm for s in r) for r in rounds}) == 6
    assert plan == plan_of("norm=obn,mbn,bn", "session=range(30)")


def test_config_yaml_is_the_dump_of_its_values_in_every_session(plan_of: Planner) -> None:
    plan = plan_of("norm=mbn", "session=0,3,12", "seed=0,5", "data_dir='a\nsession: 0\nseed: 0\n b'")
    assert len(plan.sessions) == 6
    for planned in plan.sessions:
        arm = plan.arms[planned.arm]
        assert "session: 0\nseed: 0\n" in arm.values["data_dir"]
        values = {**arm.values, "session": planned.session, "seed": planned.seed}
        body = {"config_hash": arm.config_hash, "choices": dict(arm.choices), **values}
        assert plan.config_text(planned) == yaml.safe_dump(body, sort_keys=False, allow_unicode=True)


def test_folders_written_by_another_command_are_ours_by_their_values(plan_of: Planner) -> None:
    plan, other = plan_of("norm=mbn", "session=0,1"), plan_of("norm=mbn", "session=0,1", "threads=3")
    for planned in other.sessions:
        folder = other.session_folder(planned)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(other.config_text(planned))
    plan.check_folders()
    path = folder / "config.yaml"
    for text in ("", "session: [\n", "lr: 0.1\nsession: 3\n"):  # cut off while it was written
        path.write_text(text)
        plan.check_folders()
        (folder / "session.json").write_text("{}")
        with pytest.raises(
            Refused, match=r"config.yaml disagrees with its folder's setting; move the folder"
        ):
            plan.check_folders()
        (folder / "session.json").unlink()
    path.write_text(other.config_text(other.sessions[1]).replace("momentum: 0.1", "momentum: 0.2"))
    with pytest.raises(Refused, match=r"s1/config.yaml disagrees"):
        plan.check_folders()


def test_defaults_are_complete_and_offline(plan_of: Planner) -> None:
    arm = plan_of().arms[0]
    assert arm.choices == {"model": "resnet9", "dataset": "digits", "norm": "obn", "batch": "bs128",
                           "optim": "sgd", "optim/schedule": "one_cycle"}  # fmt: skip
    assert arm.values["epochs"] == 10
    assert None not in [v for k, v in flatten(arm.values["norm"])]


def test_a_users_file_hidden_by_ours_is_refused(refusal: Any, tmp_path: Path) -> None:
    (tmp_path / "mine" / "norm").mkdir(parents=True)
    (tmp_path / "mine" / "norm" / "bn.yaml").write_text("_target_: mine.BN\n_partial_: true\n")
    line = refusal("norm=bn", "--config-dir", "mine")
    assert "norm/bn.yaml is hidden by ours of that name; give it another" in line and line.count("\n") == 1


def test_a_users_norm_yaml_and_custom_options_are_left_to_the_constructor(
    plan_of: Planner, tmp_path: Path
) -> None:
    (tmp_path / "mine" / "norm").mkdir(parents=True)
    (tmp_path / "mine" / "norm" / "wild.yaml").write_text("_target_: torch.nn.BatchNorm2d\n_partial_: true\n")
    plan = plan_of("norm=wild", "+norm.eps=1e-3", "--config-dir", str(tmp_path / "mine"))
    assert plan.arms[0].values["norm"]["eps"] == 1e-3
    custom = plan_of("norm=custom", "norm._target_=torch.nn.BatchNorm2d", "+norm.eps=1e-3")
    other = plan_of("norm=custom", "norm._target_=torch.nn.SyncBatchNorm", "+norm.eps=1e-3")
    assert not same(custom, other)


def test_refused_is_a_value_error() -> None:
    assert issubclass(Refused, ValueError)
