"""Folders are found from anywhere; a file is written whole or not at all."""
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import cai_course
from cai_course import paths
from cai_course.errors import CourseError
from cai_course.paths import constitutions_dir, data_dir, model_dir, write_atomic


def test_folders_are_absolute_and_do_not_depend_on_the_current_directory(tmp_path, monkeypatch):
    here = data_dir(), constitutions_dir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "constitutions").mkdir()
    assert (data_dir(), constitutions_dir()) == here
    assert all(folder.is_absolute() and folder.is_dir() for folder in here)


def test_an_installed_package_uses_the_folders_inside_it(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "cai_course"
    (package / "_assets" / "data" / "models" / "pocket-x").mkdir(parents=True)
    (tmp_path / "site-packages" / "data").mkdir()  # somebody else's folder beside the package
    monkeypatch.setattr(cai_course, "__file__", str(package / "__init__.py"))
    assert data_dir() == package.resolve() / "_assets" / "data"
    assert model_dir("pocket-x") == data_dir() / "models" / "pocket-x"


def test_a_missing_folder_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(cai_course, "__file__", str(tmp_path / "cai_course" / "__init__.py"))
    with pytest.raises(CourseError, match=r"constitutions/ was not found.*Install the package again"):
        constitutions_dir()


@pytest.mark.parametrize("name", ["", ".", "..", "../models", "google/flan-t5-small", "/etc", "a\\b", "no-such-model", "a\0b"])
def test_names_that_the_course_does_not_ship(name):
    assert model_dir(name) is None


def test_a_stray_file_is_not_a_model(tmp_path, monkeypatch):
    (tmp_path / "data" / "models").mkdir(parents=True)
    (tmp_path / "data" / "models" / "README.md").write_text("not a model")
    monkeypatch.setattr(cai_course, "__file__", str(tmp_path / "cai_course" / "__init__.py"))
    assert model_dir("README.md") is None


@pytest.mark.parametrize("content, stored", [("a\nb\r\n", b"a\nb\r\n"), ("Grüße", "Grüße".encode()), (b"\x00\xff", b"\x00\xff"),
                                             (bytearray(b"x"), b"x"), ("", b"")])
def test_content_arrives_byte_for_byte(tmp_path, content, stored):
    path = tmp_path / "new" / "folder" / "file"
    assert write_atomic(path, content) == path
    assert path.read_bytes() == stored
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are a POSIX matter")
def test_a_written_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_atomic(tmp_path / "atomic", "x")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_bad_input_is_refused_and_the_old_file_stays(tmp_path):
    path = write_atomic(tmp_path / "file", "old")
    with pytest.raises(CourseError, match=r"content is a dict.*needs bytes or str"):
        write_atomic(path, {"a": 1})
    with pytest.raises(CourseError, match="is a folder"):
        write_atomic(tmp_path, "x")
    assert path.read_text() == "old"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_on_the_way_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch, step):
    path = write_atomic(tmp_path / "file", "old")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(paths.os, step, full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_killed_at_any_instant_the_file_is_whole(tmp_path):
    path = tmp_path / "file"
    program = ("import sys\nfrom cai_course.paths import write_atomic\nn = 0\nprint('ready', flush=True)\n"
               "while True:\n    n += 1\n    write_atomic(sys.argv[1], f'{n % 10}' * 300_000)\n")
    for seconds in (0.02, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE,
                                   cwd=Path(cai_course.__file__).parents[1])
        process.stdout.readline()
        while not path.exists() and process.poll() is None:  # a busy machine may be slow to begin
            time.sleep(0.005)
        time.sleep(seconds)
        process.kill()
        process.wait()
        process.stdout.close()
        content = path.read_text()
        assert len(content) == 300_000 and len(set(content)) == 1


def test_two_writers_never_mix(tmp_path):
    path = tmp_path / "file"
    writers = [threading.Thread(target=lambda letter=letter: [write_atomic(path, letter * 50_000) for _ in range(10)])
               for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_text() in ("a" * 50_000, "b" * 50_000)
    assert os.listdir(tmp_path) == ["file"]
