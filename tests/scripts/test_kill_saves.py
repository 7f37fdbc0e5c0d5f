"""scripts/kill_saves.py: its fork server, what it takes a clean resume to be, and the report that lies in results/."""

import json
import os
import re
import socket
import sys
import threading
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import kill_saves as script

ROOT = Path(__file__).resolve().parents[2]
EVENTS = (
    "1\tos.mkdir\tcheckpoint-1\t0\n2\tos.rename\tcheckpoint-1\t0\n3\tos.rename\tcheckpoint-2\t0\n"
    "4\tos.rename\tcheckpoint-1\t0\n5\topen\tmetrics.jsonl\t1\n"
)


def row(label, resumed, verdict="PASS", crashed=True, drift=False):
    outcome = SimpleNamespace(resumed_from_step=resumed, weights_diff=0.0)
    return SimpleNamespace(label=label, verdict=verdict, crashed=crashed, drift=drift, outcome=outcome)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (row("no crash (control)", None, crashed=False), "PASS"),
        (row("#2 os.rename:checkpoint-1 [before]", None), "PASS"),
        (row("#3 os.rename:checkpoint-2 [before]", 1), "PASS"),
        (row("#3 os.rename:checkpoint-2 [before]", None), "LOST_WORK"),  # checkpoint-1 was whole
        (row("#5 open:metrics.jsonl [torn]", 1), "LOST_WORK"),
        (row("#5 open:metrics.jsonl [torn]", 2, crashed=False), "NOT_REACHED"),
        (row("#5 open:metrics.jsonl [torn]", 2, drift=True), "NOT_REACHED"),
        (row("#5 open:metrics.jsonl [torn]", None, verdict="HARD_FAIL"), "HARD_FAIL"),
    ],
    ids=str,
)
def test_only_a_reached_point_and_the_newest_checkpoint_pass(tmp_path, monkeypatch, found, verdict):
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "events.log.rank0").write_text(EVENTS)
    runner = ModuleType("ckpt_chaos.runner")
    runner.rejudge = lambda work: [found]
    monkeypatch.setitem(sys.modules, "ckpt_chaos", ModuleType("ckpt_chaos"))
    monkeypatch.setitem(sys.modules, "ckpt_chaos.runner", runner)
    assert [found["verdict"] for found in script.judged(tmp_path)] == [verdict]


def test_a_fork_gets_environment_and_output_of_who_asks_and_its_end_is_theirs(tmp_path, monkeypatch, capfd):
    seen = {}
    monkeypatch.setenv("CKPT_CHAOS_CRASH_AT", "7")
    monkeypatch.setattr(script.os, "fork", lambda: 0)  # in this process: what the child does, and what the parent sees
    monkeypatch.setattr(script.os, "waitpid", lambda child, options: (child, 137 << 8))
    monkeypatch.setattr(script.os, "dup2", lambda handle, number: seen.setdefault(number, os.fstat(handle).st_ino))
    monkeypatch.setattr(script, "run_fork", lambda steps, **request: seen.update(request, steps=steps))
    address = str(tmp_path / "forks")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        server.settimeout(30)
        serving = threading.Thread(target=script.serve, args=(server, 3))
        serving.start()
        assert script.ask(address, "out", "resume") == 137
        serving.join()
    assert seen["environment"]["CKPT_CHAOS_CRASH_AT"] == "7"
    assert (seen["out"], seen["what"], seen["steps"]) == ("out", "resume", 3)
    assert (seen[1], seen[2]) == (os.fstat(1).st_ino, os.fstat(2).st_ino)


def test_resumes_are_recognised_by_what_the_trainer_and_the_script_say():
    for said in ("going on from OUT/checkpoints/checkpoint-12\n", f"{script.FINISHED} OUT/checkpoints/checkpoint-12"):
        assert re.search(script.RESUMED, said)[1] == "12"
    assert not re.search(script.RESUMED, "adapter written to OUT; checkpoints in OUT/checkpoints/checkpoint-3")
    assert "going on from " in (ROOT / "mage_tune" / "run.py").read_text()


def test_without_the_tool_it_says_what_to_install(monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(script, "version", missing)
    monkeypatch.setattr(sys, "argv", ["kill_saves.py"])
    assert script.main() == 2
    assert capsys.readouterr().err == "error: ckpt-chaos is not installed; run: pip install ckpt-chaos==0.1.8\n"


def test_the_report_is_of_every_event_and_clean():
    report = json.loads((ROOT / "results" / "ckpt_chaos.json").read_text())
    points = report["points"]
    assert report["verdicts"] == {"PASS": len(points)}
    assert {point["verdict"] for point in points} == {"PASS"} and all(point["same_adapter"] for point in points)
    assert all(point["resumed_from"] == point["newest_whole"] for point in points)
    for mode in ("before", "unsynced"):
        numbers = [int(p["point"][1:].split()[0]) for p in points if p["point"].endswith(f"[{mode}]")]
        assert numbers == list(range(1, max(numbers) + 1))
    renamed = {p["point"].split()[1] for p in points if "os.rename:checkpoint" in p["point"]}
    assert renamed == {f"os.rename:checkpoint-{step}" for step in (1, 2, 3)}
