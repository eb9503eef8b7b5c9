"""Many session folders from one real one: what a sweep of thousands leaves, without training.

python tests/folders.py outputs/adhoc big 100000       copies of the first finished session of outputs/adhoc
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from normbench.claim import Claim
from normbench.plan import Plan, Planned

KINDS = ("ok", "failed", "interrupted", "running", "waiting")
NOBODY = 2**22 + 1  # above the largest pid there is


def many(template: Plan, out: Path, sessions: int, arms: int = 1, kinds: Sequence[str] = ("ok",)) -> Plan:
    """Fill `out`/<study> with a plan of copies of a real session, of these kinds in turn; no fsync, no fields
    made up but times and numbers. A "running" one is held by a living process of another machine."""
    done = next(s for s in template.sessions if template.finished(s))
    source, arm = template.session_folder(done), template.arms[done.arm]
    document = json.loads((source / "session.json").read_text())
    values = {**arm.values, "out": str(out)}
    copies = [replace(arm, setting=f"{arm.arm}-copy{i}-{i:010d}", arm=f"{arm.arm}-copy{i}", values=values)
              for i in range(arms)]  # fmt: skip
    order = [Planned(i % arms, i // arms, 0, i) for i in range(sessions)]
    plan = Plan(template.study, copies, order)
    manifest = {key: value for key, value in document.items() if key != "row"}
    tail = json.dumps(manifest, indent=1, ensure_ascii=False)[1:]
    for planned in order:
        kind = kinds[planned.launch_order % len(kinds)]
        if kind == "waiting":
            continue
        copy = copies[planned.arm]
        row = {**document["row"], "setting": copy.setting, "arm": copy.arm, "session": planned.session,
               "launch_order": planned.launch_order,
               "test_acc": 0.5 + planned.launch_order / 1e7}  # fmt: skip
        folder = plan.session_folder(planned)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(plan.config_text(planned))
        (folder / "epochs.csv").write_bytes((source / "epochs.csv").read_bytes())
        if kind == "ok":
            text = json.dumps({"row": row}, indent=1, ensure_ascii=False)
            (folder / "session.json").write_text(text.removesuffix("\n}") + "," + tail)
        elif kind == "failed":
            body = {"row": {**row, "status": "failed", "error": "MemoryError: of it"}, "attempt": 2,
                    "traceback": "", "again": False}  # fmt: skip
            (folder / "failure.json").write_text(json.dumps(body, indent=1))
        else:
            claimed(folder, row, alive=kind == "running")
    plan.write()
    return plan


def claimed(folder: Path, row: object, alive: bool) -> Path:
    """A claim of a process on another machine, as its file stands there: beating until now, or given up."""
    machine = {"host": "elsewhere", "machine": "elsewhere", "pid": NOBODY, "born": "1", "job": None}
    known = {**Claim(folder, 1, **machine, since="2026-11-21T18:00:00.000Z", row=row).body}  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "claim-1.json"
    path.write_text(json.dumps({**known, "released": not alive}))
    return path


if __name__ == "__main__":
    study, out, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    found = Plan.newest(study)
    assert found is not None
    kinds = sys.argv[5].split(",") if len(sys.argv) > 5 else ["ok"]
    many(found, out, count, arms=int(sys.argv[4]) if len(sys.argv) > 4 else 1 + count // 30, kinds=kinds)
