"""Run folders and prompt files: whole or absent, one at a time, the same text for the same content."""
import gzip
import json
import os
from pathlib import Path

import pytest

from cai_course import runs
from cai_course.errors import CourseError
from cai_course.runs import RunFolder, differences, fingerprint, first_human_turn, from_jsonl, jsonable, read_prompts, to_jsonl

# --- JSON lines ---

@pytest.mark.parametrize("text", ["", "a\nb", "\u2028 \u2029 \x85 \x0b \x0c \r", "\"\\", "caf\u00e9 \U0001f600", "</script>", "\x00\x1b"])
def test_any_text_survives_json_lines(text):
    rows = [{"prompt": text, "n": 1}, {"prompt": "next", "n": 2}]
    assert from_jsonl(to_jsonl(rows)) == rows
    assert to_jsonl(rows).count("\n") == 2


def test_numbers_that_are_none():
    import numpy as np

    assert jsonable({"a": float("nan"), "b": [float("inf"), 1], 3: np.float32(.5), "c": np.arange(2)}) == {"a": None, "b": [None, 1], "3": .5, "c": [0, 1]}


# --- fingerprints ---

def test_fingerprints(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "x").write_bytes(b"12")
        (tmp_path / name / "y").write_bytes(b"3")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "y").rename(tmp_path / "b" / "z")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    (tmp_path / "a" / "deep" / "x").write_bytes(b"1")
    (tmp_path / "a" / "y").write_bytes(b"23")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b"), "the border between two files must count"


# --- the folder ---

def test_publish_is_whole_or_absent(tmp_path):
    def half(path):
        path.mkdir()
        (path / "one").write_text("1")
        raise RuntimeError("stop")
    with RunFolder(tmp_path / "run") as run:
        with pytest.raises(RuntimeError):
            run.publish("30_sl_cai", half)
        assert not run.has("30_sl_cai")
        run.publish("30_sl_cai", lambda path: (path.mkdir(), (path / "one").write_text("1")))
        assert (run.path / "30_sl_cai" / "one").read_text() == "1"
        run.publish("30_sl_cai", lambda path: (path.mkdir(), (path / "two").write_text("2")))
        assert [each.name for each in (run.path / "30_sl_cai").iterdir()] == ["two"]
    assert sorted(each.name for each in run.path.iterdir()) == [".lock", "30_sl_cai"]


def test_leftovers_are_swept_by_the_next_holder(tmp_path):
    (tmp_path / ".30_sl_cai.99.abcd.tmp" / "deep").mkdir(parents=True)
    (tmp_path / ".log.jsonl.99.abcd.tmp").write_text("half")
    with RunFolder(tmp_path):
        assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_a_link_among_the_leftovers_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis").write_text("years")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".x.tmp").symlink_to(tmp_path / "precious")
    with RunFolder(tmp_path / "run"):
        pass
    assert (tmp_path / "precious" / "thesis").exists()


def test_rows_of_missing_and_damaged_artefacts(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(CourseError, match="is missing. Run the same"):
        run.rows("10_replies.jsonl")
    (tmp_path / "10_replies.jsonl").write_bytes(b'{"a": 1}\n\xff')
    with pytest.raises(CourseError, match="changed by hand"):
        run.rows("10_replies.jsonl")


def test_differences():
    old = {"config": {"steps": 1, "beta": .1}, "inputs": {"model": {"name": "a", "sha256": "1"}}, "seeds": [0]}
    new = {"config": {"steps": 2, "beta": .1, "extra": "x"}, "inputs": {"model": {"name": "b", "sha256": "1"}}}
    assert differences(old, new) == ["config.steps: 1 in the folder, 2 now", "seeds: [0] in the folder, nothing now",
                                     "config.extra: nothing in the folder, x now"]
    new["inputs"]["model"]["sha256"] = "2"
    assert "inputs.model: a in the folder, b now, with other content" in differences(old, new)
    assert differences(old, new, skip=("config.steps", "seeds", "config.extra", "inputs.model.sha256")) == []


def test_errors_of_the_disk_are_told_from_others(tmp_path):
    import errno

    class SafetensorError(Exception):
        pass
    for error in (OSError(errno.ENOSPC, "full"), SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")):
        with pytest.raises(CourseError, match="the disk is full"), runs.disk_errors(tmp_path):
            raise error
    with pytest.raises(CourseError, match="read-only file system"), runs.disk_errors(tmp_path):
        try:
            raise OSError(errno.EROFS, "ro")
        except OSError as error:
            raise RuntimeError("saving failed") from error
    for error in (FileNotFoundError(errno.ENOENT, "gone"), ValueError("no space left in this sentence"), ZeroDivisionError()):
        with pytest.raises(type(error)), runs.disk_errors(tmp_path):
            raise error


# --- prompts ---

def test_every_form_of_prompts_gives_the_same_list(tmp_path):
    wanted = ["How do I bake, \"quickly\"?", "Caf\u00e9\u2028or tea?"]
    turns = [{"chosen": f"\n\nHuman: {each}\n\nAssistant: Sure.\n\nHuman: Thanks.\n\nAssistant: Fine.", "rejected": "x"} for each in wanted]
    chat = [{"prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": each}]} for each in wanted]
    rows = [{"prompt": each, "id": 1} for each in wanted]
    files = {"a.jsonl": to_jsonl(rows), "b.jsonl": "\n" + to_jsonl(turns), "c.jsonl": to_jsonl(chat), "d.json": json.dumps(wanted),
             "e.json": json.dumps(rows, indent=1), "f.csv": "id,prompt\r\n1,\"How do I bake, \"\"quickly\"\"?\"\r\n2,Caf\u00e9\u2028or tea?\r\n",
             "g.txt": "\n".join(["", *wanted, ""]), "h.TXT": "\r\n".join(wanted), "i.jsonl": to_jsonl(rows + rows)}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
        assert read_prompts(tmp_path / name) == wanted, name
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        assert read_prompts(tmp_path / f"{name}.gz") == wanted, name
        (tmp_path / f"bom-{name}").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_prompts(tmp_path / f"bom-{name}") == wanted, name
        assert read_prompts(tmp_path / name, limit=1) == wanted[:1]


def test_first_human_turn():
    assert first_human_turn("\n\nHuman: a\nb\n\nAssistant: c\n\nHuman: d") == "a\nb"
    assert first_human_turn("\n\nHuman: only") == "only"
    assert first_human_turn(" nobody speaks ") == "nobody speaks"


def test_limits_are_exact(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a" * runs.MAX_PROMPT_CHARACTERS)
    assert len(read_prompts(path)[0]) == runs.MAX_PROMPT_CHARACTERS
    path.write_text("a" * (runs.MAX_PROMPT_CHARACTERS + 1))
    with pytest.raises(CourseError, match="limit is 4,000"):
        read_prompts(path)


@pytest.mark.skipif(not os.environ.get("CAI_COURSE_REAL_DATA"), reason="CAI_COURSE_REAL_DATA names no folder of real data")
def test_the_real_red_team_prompts():
    path = Path(os.environ["CAI_COURSE_REAL_DATA"]) / "hh-rlhf" / "harmless-base-even.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    prompts = read_prompts(path)
    assert len(prompts) > 1_000 and all(each == each.strip() and each for each in prompts)
