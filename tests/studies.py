"""Studies as training leaves them, written without training: plans, sessions, traces, profiles."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from normbench.plan import Arm, Plan, Planned, write_json
from normbench.results import COLUMNS

EPOCHS = ("epoch", "step", "train_loss", "train_acc", "val_loss", "val_acc", "test_loss", "test_acc", "lr",
          "epoch_time_s", "eval_time_s", "images_per_s", "peak_memory_mib", "finished_at")  # fmt: skip
LAYERS = ("prep.norm", "layer1.norm", "layer2.norm", "layer3.norm")
Rows = Sequence[Sequence[object]]


def write_csv(path: Path, head: Sequence[str], rows: Rows) -> None:
    """A CSV file, its folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def values_of(arm: str, out: str, question: str) -> dict[str, Any]:
    """What a plan says of an arm, as far as reports read it."""
    norm, _, rest = arm.partition("-stride")
    options = {"stride": int(rest)} if rest.isdigit() else {}
    return {"model": {"_target_": "normbench.models.resnet9.ResNet9", "width": 64},
            "norm": {"_target_": f"normbench.norms.{norm}", "_partial_": True, "eps": 1e-5, **options},
            "batch": {"size": 128}, "optim": {"lr": 0.1}, "epochs": 10, "steps": None, "pack": None,
            "precision": "fp32", "out": out, "study": {"name": "made", "question": question}}  # fmt: skip


def make_study(out: Path, arms: Mapping[str, float], sessions: int, *, finished: int | None = None,
               epochs: int = 8, name: str = "made", question: str = "", seed: int = 3) -> Path:  # fmt: skip
    """A study's folder: arm → how much its accuracy is above the first's.

    Args:
        finished: how many of the planned sessions have ended; null is all.
    """
    draws = np.random.default_rng(seed)
    planned_arms = [
        Arm(f"{arm}-resnet9-digits-{i:010x}", f"{arm}-resnet9-digits", f"{i:010x}",
            {"model": "resnet9", "dataset": "digits", "norm": arm.partition("-")[0]},
            values_of(arm, str(out), question))
        for i, arm in enumerate(arms)
    ]  # fmt: skip
    places = [(s, i) for s in range(sessions) for i in draws.permutation(len(arms))]
    planned = [Planned(int(i), s, 0, order) for order, (s, i) in enumerate(places)]
    plan = Plan(name, planned_arms, planned)
    plan.write()
    shared = draws.normal(0, 0.004, sessions)
    for each in planned[:finished]:
        acc = 0.95 + list(arms.values())[each.arm] + shared[each.session] + draws.normal(0, 0.0015)
        write_session(plan, each, float(min(acc, 0.999)), epochs, draws)
    return plan.folder


def write_session(plan: Plan, each: Planned, acc: float, epochs: int, draws: np.random.Generator) -> None:
    """A finished session's folder."""
    folder, arm = plan.session_folder(each), plan.arms[each.arm]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(plan.config_text(each))
    gone = 0.6 * np.exp(-np.arange(1, epochs + 1) / 2) * draws.uniform(0.8, 1.2, epochs)
    times = 1.2 + 0.1 * each.arm + 0.02 * draws.standard_normal(epochs)
    write_csv(folder / "epochs.csv", EPOCHS, [
        [e + 1, 12 * (e + 1), 0.05 + 2 * gone[e], 1 - gone[e], "", "", 0.1 + gone[e],
         acc - gone[e] + gone[-1], 0.1, times[e], 0.1, 1437 / times[e], 300.0, "2026-11-21T10:00:00.000Z"]
        for e in range(epochs)
    ])  # fmt: skip
    row = dict.fromkeys(COLUMNS) | {
        "study": plan.study, "setting": arm.setting, "arm": arm.arm, "session": each.session,
        "seed": each.seed,
        "status": "ok", **arm.choices, "batch_size": 128, "epochs": epochs, "lr": 0.1, "precision": "fp32",
        "compile": False, "pack": 1, "threads": 1, "slots": 1, "device": "cpu", "device_name": "AMD EPYC",
        "test_acc": acc, "test_loss": 0.2 - 0.1 * acc, "train_loss": 0.06, "best_test_acc": acc,
        "epoch_time_s": float(np.median(times)), "total_time_s": float(times.sum()), "peak_memory_mib": 300.0,
        "warnings": "", "launch_order": each.launch_order, "hostname": "here", "torch_version": "2.15.0",
        "started_at": f"2026-11-21T{10 + each.launch_order // 60:02}:{each.launch_order % 60:02}:00.000Z",
        "finished_at": f"2026-11-21T{10 + each.launch_order // 60:02}:{each.launch_order % 60:02}:50.000Z",
        "git_commit": "69462d4", "config_hash": arm.config_hash,
    }  # fmt: skip
    ops = {"forward": {"aten.native_batch_norm": 1}, "backward": {"aten.native_batch_norm_backward": 1}}
    layers = [{"name": layer, "class": f"normbench.norms.{arm.choices['norm']}", "repr": "64, eps=1e-05",
               "input_shape": [128, 64, 8, 8], "parameters": 128, "trainable_parameters": 128, "fused": False,
               "ops": {**ops, "eval": {"aten.native_batch_norm": 1}}} for layer in LAYERS]  # fmt: skip
    manifest = {"norm_layers": layers, "compiled": False, "cuda_graph": False, "kernels": None,
                "idle_options": [],
                "never_moved": [], "warnings": [], "notes": []}  # fmt: skip
    write_json(folder / "session.json", {"row": row, "images": {"train": 1437, "test": 360},
                                         "manifest": manifest, "config": arm.values})  # fmt: skip


def warn(session: Path, *warnings: str) -> None:
    """Let a session's manifest warn."""
    body = json.loads((session / "session.json").read_text())
    body["manifest"]["warnings"] += warnings
    body["row"]["warnings"] = "; ".join(body["manifest"]["warnings"])
    write_json(session / "session.json", body)


def write_traces(session: Path, epochs: int = 8, channels: int = 6, seed: int = 0) -> None:
    """A session's traces/, in the columns that training writes."""
    draws = np.random.default_rng(seed)
    norms = [
        [step, step // 12 + 1, layer, c, draws.normal(), 1 + 0.1 * draws.random(), draws.normal(),
         1 + 0.1 * draws.random(), 1 - step / 500, step / 500, draws.normal(0, 0.01), ""]
        for step in range(0, 12 * epochs, 12) for layer in LAYERS[:2] for c in range(channels)
    ]  # fmt: skip
    head = ("step", "epoch", "layer", "channel", "batch_mean", "batch_std", "running_mean", "running_var",
            "weight",
            "bias", "weight_grad", "bias_grad")  # fmt: skip
    write_csv(session / "traces" / "norms.csv", head, norms)
    spread = [(-2 - 0.1 * e, -0.5, 0.5, 2 + 0.1 * e) for e in range(epochs)]
    write_csv(session / "traces" / "features.csv",
              ("epoch", "step", "layer", "q01", "q20", "q80", "q99", "part", "values", "out_of"),
              [[e + 1, 12 * (e + 1), layer, *spread[e], "test", 1000, 1000]
               for e in range(epochs) for layer in LAYERS[:2]])  # fmt: skip
    write_csv(session / "traces" / "logits.csv",
              ("epoch", "step", "peak_mean", "peak_q01", "peak_q20", "peak_q80", "peak_q99", "part"),
              [[e + 1, 12 * (e + 1), 3.0 + e, 1.0, 2.0 + e / 2, 4.0 + e, 6.0 + e, "test"]
               for e in range(epochs)])  # fmt: skip


def write_profile(folder: Path, arms: Sequence[str], layers: int = 8, rounds: int = 7) -> Path:
    """A profile.json as `profile` writes it, of arms as studies call them: `mbn-stride2`."""
    draws = np.random.default_rng(1)

    def times(seconds: float) -> list[float]:
        return (seconds * draws.uniform(0.95, 1.1, rounds)).tolist()

    def passes(i: int, layer: int) -> dict[str, list[float]]:
        spent = 1e-4 * 2 ** (-layer / 2) * (1 + 0.2 * i)
        return {"forward_s": times(spent), "backward_s": times(2 * spent)}

    size = [2 ** (22 - layer // 2) for layer in range(layers)]
    names = [f"layer{layer}.norm" for layer in range(layers)]
    made = [
        {"arm": arm.replace("-stride", " stride="), "norm": arm.partition("-")[0], "stride": None,
         "norm_options": {k: v for k, v in values_of(arm, "", "")["norm"].items() if k != "_partial_"},
         "precision": "fp32", "channels_last": False, "batch_size": 128, "without": "resnet9",
         "step_s": times(0.01), "observed_step_s": times(0.0101), "odd_share": 0.0,
         "layers": [
             {"layer": name, "layer_index": at, "shape": [128, 64 + at, 32, 32], "alike": f"{arm}{at}",
              "fused": False, "relu_inside": False, **passes(i, at), "forward_bytes": 3 * size[at],
              "backward_bytes": 5 * size[at], "forward_operators": {"aten.batch_norm": 1},
              "backward_operators": {"aten.batch_norm_backward": 2}} for at, name in enumerate(names)]}
        for i, arm in enumerate(arms)
    ]  # fmt: skip
    write_json(folder / "profile.json", {
        "format": 2, "quick": False, "complete": True, "cpu_share": 1.0, "model": "resnet9",
        "dataset": "digits", "made_at": "2026-11-22T01:00:00Z",
        "machine": {"device": "cpu", "device_name": "AMD EPYC", "threads": 1, "torch": "2.15.0",
                    "driver_version": "Linux", "cuda_version": None},
        "arms": made, "compare": [],
        "without": {"resnet9": {"step_s": times(0.008), "relus": {}, "empty": {}, "odd_share": 0.0}},
        "alone": [
            {"tensor_bytes": size[at], "copy_s": times(2 * size[at] / 12e9),
             "layers": {f"{arm}{at}": {**passes(i, at), "peak_memory_bytes": 2**20, "missing": None}
                        for i, arm in enumerate(arms)}} for at in range(layers)],
    })  # fmt: skip
    return folder
