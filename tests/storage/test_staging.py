"""What a run that was killed left behind: removed by the next, never while another one fills it."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from linlora.storage import staging
from linlora.storage.files import write_text
from linlora.storage.staging import unfinished_file, unfinished_folder
from linlora.storage.tensor_files import load_tensors, save_tensors

FILL = """
import os, pathlib, signal, sys
from linlora.storage.staging import unfinished_file, unfinished_folder
place = pathlib.Path(sys.argv[1])
with unfinished_folder(place) as folder, unfinished_file(place) as (file, _):
    (folder / "model").write_bytes(bytes(1000))
    file.write(bytes(1000))
    print("filling", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(place):
    process = subprocess.Popen([sys.executable, "-c", FILL, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"filling\n"
    return process


def test_what_a_killed_run_left_is_removed_but_not_what_another_one_fills(tmp_path):
    place = tmp_path / "model"
    killed, running = start(place), start(place)
    killed.communicate()
    (tmp_path / ".model.backup00.unfinished.old").mkdir()
    (tmp_path / ".other.abcdefgh.unfinished").mkdir()
    (tmp_path / ".model.notes").write_text("")
    assert len(list(tmp_path.glob(".model.????????.unfinished"))) == 4
    with unfinished_folder(place) as folder:
        assert len(list(tmp_path.glob(".model.????????.unfinished"))) == 3
        assert folder.is_dir()
    running.communicate()
    with unfinished_file(place):
        pass
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".model.backup00.unfinished.old", ".other.abcdefgh.unfinished", ".model.notes"}


@pytest.mark.parametrize(
    "write", [lambda place: write_text(place, "text"), lambda place: save_tensors(place, {"w": torch.ones(2)}, {})]
)
def test_every_way_to_write_a_file_removes_what_a_killed_run_left_of_it(write, tmp_path):
    (tmp_path / ".v.abcdefgh.unfinished").write_text("half")
    write(tmp_path / "v")
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def fill_folder(place):
    with unfinished_folder(place) as folder:
        folder.rename(place)


@pytest.mark.parametrize("write", [lambda place: save_tensors(place, {"w": torch.ones(2)}, {}), fill_folder])
def test_what_another_run_removes_before_it_is_locked_is_made_again(write, tmp_path, monkeypatch):
    place, lock = tmp_path / "v", staging._lock

    def late(*arguments, **options):
        monkeypatch.setattr(staging, "_lock", lock)
        with unfinished_file(place):  # removes what lies there unlocked
            pass
        return lock(*arguments, **options)

    monkeypatch.setattr(staging, "_lock", late)
    write(place)
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("write", [lambda place: write_text(place, "text"), fill_folder], ids=["file", "folder"])
def test_a_folder_that_cannot_be_written_is_named(write, code, tmp_path, monkeypatch):
    def refused(path, *arguments, **options):
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(staging, "_new_file", refused)
    monkeypatch.setattr(staging, "_new_folder", refused)
    with pytest.raises(OSError, match=r"^cannot write in .*; choose another folder$") as error:
        write(tmp_path / "there" / "v")
    assert f"{tmp_path / 'there'}: {os.strerror(code)}" in str(error.value)
    assert "unfinished" not in str(error.value)


def test_a_link_in_the_place_of_what_was_left_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (tmp_path / ".v.abcdefgh.unfinished").symlink_to("precious")
    save_tensors(tmp_path / "v", {"w": torch.ones(2)}, {})
    assert load_tensors(tmp_path / "v")[0]["w"].tolist() == [1.0, 1.0]
    assert (tmp_path / "precious" / "file").read_text() == "kept"
