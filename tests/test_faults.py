"""What a run survives: SIGKILL at any instant, Ctrl-C, a full disk, a read-only folder, a second process."""
import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from cai_course import cai, runs
from cai_course.cli import main
from cai_course.errors import CourseError

KILLS = 25
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and forks of POSIX systems are needed")


def contents(folder):
    """Every file that must not depend on interruptions, with its bytes."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or Path(name).name in ("timings.json", ".lock"):
            continue
        found[name] = path.read_bytes()
        if path.name == "results.json":
            results = json.loads(found[name])
            assert results.pop("seconds") >= 0 and results.pop("peak_memory_mb") >= 0
            found[name] = json.dumps(results)
    return found


@pytest.fixture(scope="module")
def server(tiny_t5, tiny_bert):
    """The forking process; call it with a command, get its outcome."""
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("fork_runs.py")), tiny_t5], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout.readline() == "ready\n"

    def ask(words, **more):
        process.stdin.write(json.dumps({"words": words, **more}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    yield ask
    process.stdin.close()
    try:
        process.wait(timeout=60)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def words(tiny_t5, tiny_bert, tiny_constitution):
    """The command of a small run, without its folder."""
    return ["align", "--fast-check", "--quiet", "--model", tiny_t5, "--reward-model", tiny_bert, "--constitution", tiny_constitution,
            "--red-team", "6", "--preferences", "6", "--human-pairs", "6", "--evaluation", "4", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def undisturbed(server, words, tmp_path_factory):
    """The folder of a run that nobody disturbed, and its duration."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = server([*words, "--out", str(folder)])
    assert done["status"] == 0, done["said"]
    return folder / "fast-check", done["seconds"]


@pytest.mark.slow
def test_killed_at_random_instants_a_run_ends_with_the_same_bytes(server, words, undisturbed, tmp_path):
    expected, duration = undisturbed
    rng, kills, rounds = random.Random(0), 0, 0
    while kills < KILLS:
        command = [*words, "--out", str(tmp_path / str(rounds))]
        while kills < KILLS:
            outcome = server(command, kill_after=rng.uniform(0, duration))
            if outcome["status"] == 0:
                duration = min(duration, outcome["seconds"]) # the machine may have become faster
                break
            assert outcome["status"] == -9, outcome["said"]
            kills += 1
        outcome = server(command)
        assert outcome["status"] == 0, outcome["said"]
        assert contents(tmp_path / str(rounds) / "fast-check") == contents(expected)
        rounds += 1
    assert kills == KILLS


@pytest.mark.slow
def test_killed_around_the_renames(server, words, undisturbed, tmp_path):
    """The random instants above seldom hit the gap between two renames, so here each attempt ends at one.

    An attempt renames the timings, then for each step the timings, the artefact and the log: 5 is right after an artefact, before the log.
    """
    expected, _ = undisturbed
    command = [*words, "--out", str(tmp_path)]
    for number in (0, 1, 4, 5, 7, 3, 5, 6, 13, 2, 5, 5, 7, 3, 4, 5):
        outcome = server(command, kill_at_rename=number)
        if outcome["status"] == 0:
            break
        assert outcome["status"] == -9, outcome["said"]
    assert server(command)["status"] == 0
    assert contents(tmp_path / "fast-check") == contents(expected)


@pytest.mark.slow
def test_several_seeds_resume_too(server, words, undisturbed, tmp_path):
    command = [*words, "--seeds", "2"]
    whole = server([*command, "--out", str(tmp_path / "whole")])
    assert whole["status"] == 0, whole["said"]
    killed = server([*command, "--out", str(tmp_path / "killed")], kill_at_rename=12, folder="seed-1")
    assert killed["status"] == -9
    assert server([*command, "--out", str(tmp_path / "killed")])["status"] == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
    alone = contents(undisturbed[0])
    inside = contents(tmp_path / "whole" / "fast-check" / "seed-0")
    assert inside == alone


def test_ctrl_c_says_how_to_resume_and_loses_nothing(server, words, undisturbed, tmp_path):
    expected, _ = undisturbed
    command = [*words, "--out", str(tmp_path)]
    outcome = server(command, kill_at_rename=23, signal="INT")
    assert outcome["status"] == 130, outcome["said"]
    assert "the same command goes on from there" in outcome["said"] and "Traceback" not in outcome["said"]
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "fast-check").glob("[1-6]0_*")}
    assert kept
    assert not list((tmp_path / "fast-check").glob(".*.tmp")) and not (tmp_path / "fast-check" / ".holder").exists()
    assert server(command)["status"] == 0
    assert contents(tmp_path / "fast-check") == contents(expected)
    for name, time in kept.items():
        assert (tmp_path / "fast-check" / name).stat().st_mtime_ns == time, f"{name} was made twice"


def test_a_finished_run_is_not_done_again(server, words, undisturbed):
    folder, duration = undisturbed
    before = {path: path.stat().st_mtime_ns for path in folder.glob("[1-7]0_*")}
    again = server([*words, "--out", str(folder.parent)])
    assert again["status"] == 0 and "harm" in again["said"]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("[1-7]0_*")} == before


def test_a_second_process_is_told_who_holds_the_folder(words, tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", "import sys\nfrom cai_course.runs import RunFolder\n"
                               f"with RunFolder({str(tmp_path / 'fast-check')!r}):\n    print('held', flush=True)\n    sys.stdin.read()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CourseError, match=f"in use by process {holder.pid}. Wait until it has finished"):
            with runs.RunFolder(tmp_path / "fast-check"):
                pass
    finally:
        holder.stdin.close()
        holder.wait(timeout=30)
    with runs.RunFolder(tmp_path / "fast-check"): # its end frees the folder
        pass


def test_a_killed_holder_frees_the_folder(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", "import os\nfrom cai_course.runs import RunFolder\n"
                               f"RunFolder({str(tmp_path)!r}).__enter__()\nos.kill(os.getpid(), 9)"])
    holder.wait(timeout=60)
    assert (tmp_path / ".holder").exists()
    with runs.RunFolder(tmp_path) as run:
        run.publish_text("manifest.json", "{}\n")
    assert not (tmp_path / ".holder").exists()


@pytest.mark.parametrize("number, message", [
    (errno.ENOSPC, "the disk is full: could not write into"), (errno.EDQUOT, "the disk is full: could not write into"),
    (errno.EROFS, "cannot write into"), (errno.EACCES, "cannot write into")])
@pytest.mark.parametrize("call", [1, 6, 14])
def test_a_disk_that_refuses(number, message, call, words, tmp_path, monkeypatch, capsys):
    """Every file is flushed before it gets its name, so a refusing fsync stands for a refusing write anywhere."""
    real, count = os.fsync, 0

    def fsync(handle):
        nonlocal count
        count += 1
        if count >= call:
            raise OSError(number, os.strerror(number))
        real(handle)
    monkeypatch.setattr(os, "fsync", fsync)
    status = main([*words, "--out", str(tmp_path)])
    said = capsys.readouterr().err.strip()
    assert status == 2 and message in said and said.startswith("error: ") and "\n" not in said
    assert "Every finished step is kept" in said
    assert not list((tmp_path / "fast-check").glob(".*.tmp"))


@pytest.fixture()
def small_disk(tmp_path):
    """A real file system of 160 kB, where this test may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(place)], capture_output=True) if os.geteuid() == 0 else None
    if made is None or made.returncode:
        pytest.skip("only root may mount a small disk here")
    yield place
    subprocess.run(["umount", "-l", str(place)])


def test_a_really_full_disk_then_more_room(server, words, undisturbed, small_disk):
    command = [*words, "--out", str(small_disk)]
    outcome = server(command)
    assert outcome["status"] == 2, outcome["said"]
    assert "the disk is full" in outcome["said"] and "Traceback" not in outcome["said"]
    assert (small_disk / "fast-check" / "10_replies.jsonl").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    outcome = server(command)
    assert outcome["status"] == 0, outcome["said"]
    assert contents(small_disk / "fast-check") == contents(undisturbed[0])


def test_a_really_read_only_disk(server, words, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    outcome = server([*words, "--out", str(small_disk)])
    assert outcome["status"] == 2
    assert "cannot write into" in outcome["said"] and "--out" in outcome["said"] and "Traceback" not in outcome["said"]


def test_a_damaged_artefact_is_named(words, undisturbed, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(undisturbed[0], tmp_path / "copy")
    (folder / "70_evaluation.jsonl").write_text('{"half": ')
    with pytest.raises(CourseError, match="70_evaluation.jsonl has been changed by hand"):
        cai.rebuild_report(folder)


@pytest.mark.parametrize("content, said", [("{", "is not the manifest of a run"), ("[1]", "is not the manifest of a run"),
                                           ("{}", "does not hold the settings of a run"),
                                           ('{"config": {"sed": 1}}', "does not hold the settings of a run")])
def test_a_damaged_manifest_is_named(undisturbed, tmp_path, content, said):
    import shutil

    folder = shutil.copytree(undisturbed[0], tmp_path / "copy")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CourseError, match=said): cai.rebuild_report(folder)
