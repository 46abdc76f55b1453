"""Full disks and folders that cannot be written to: one line that says what is needed, the former file intact."""

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from processes import FORKS, PATIENCE, make_pictures, start, training

from visionattn._writing import SavingError, remove_stale, replaced
from visionattn.cli import main
from visionattn.tasks.config import write_text
from visionattn.tasks.saving import DurableCheckpointIO

OLD, NEW = {"x": torch.zeros(10)}, {"x": torch.zeros(100_000)}  # 400 kB do not fit where there is room for 100


@pytest.fixture
def last(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    DurableCheckpointIO().save_checkpoint(OLD, path)
    return path


def assert_intact(last):
    assert torch.equal(torch.load(last, weights_only=True)["x"], OLD["x"])
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


@pytest.fixture
def room_for_100_kb():
    """A limit of the size of files, which fails in the middle of a write as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_errors_of_other_files_are_not_of_the_one_that_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="pictures") as error, replaced(tmp_path / "model.onnx"):
        (tmp_path / "pictures").open()
    assert not isinstance(error.value, SavingError)
    for name in (".model.onnx.x/config.json", "model.onnx.here.1.part"):
        with pytest.raises(SavingError, match=r"cannot write .*model\.onnx"), replaced(tmp_path / "model.onnx"):
            (tmp_path / name).open()


def test_full_disk_leaves_the_former_checkpoint(last, room_for_100_kb):
    with pytest.raises(SavingError, match=r"last\.ckpt.*0\.4 MB needed, [\d.]+ MB free.*intact.*free some") as error:
        DurableCheckpointIO().save_checkpoint(NEW, last)
    assert error.value.errno == errno.EFBIG
    assert_intact(last)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "may write to"),
        (errno.EACCES, "may write to"),
        (errno.EIO, "check the disk"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_every_error_of_the_disk_is_named(last, monkeypatch, number, remedy, call):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pathlib.Path.replace" if call == "replace" else "os.fsync", fail)
    with pytest.raises(SavingError, match=rf"last\.ckpt: {os.strerror(number)}, 0\.4 MB needed.*{remedy}"):
        DurableCheckpointIO().save_checkpoint(NEW, last)
    monkeypatch.undo()
    assert_intact(last)


def test_content_is_synced_before_its_name(last, monkeypatch):
    order, sync, rename = [], os.fsync, type(last).replace

    def synced(descriptor):
        order.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def renamed(path, target):
        order.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(type(last), "replace", renamed)
    DurableCheckpointIO().save_checkpoint(NEW, last)
    assert order[0].endswith(".part") and order[1:] == ["rename", str(last.parent)]


@pytest.mark.parametrize("place", ["below_a_file", "proc"])  # where not even root may write
def test_run_that_cannot_be_written_ends_with_one_line(tmp_path, place):
    (tmp_path / "file").write_text("not a folder")
    output = {"below_a_file": str(tmp_path / "file"), "proc": "/proc/sys"}[place]
    pictures = make_pictures(tmp_path / "pictures", 1, 1)
    with pytest.raises(SystemExit, match=rf"^error: cannot write {output}/x/.*may write to") as stop:
        main([*training(pictures, output, "x")])
    assert "\n" not in str(stop.value)
    assert (tmp_path / "file").read_text() == "not a folder"


def limited(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    from processes import _command

    _command(*args)


@pytest.mark.slow
def test_training_on_a_full_disk_ends_with_one_line_and_the_former_checkpoint(tmp_path):
    log, last = tmp_path / "log", tmp_path / "x" / "checkpoints" / "last.ckpt"
    arguments = training(make_pictures(tmp_path / "pictures", 8, 1), tmp_path, "x", "trainer.max_epochs=1")
    process = start(arguments, log)
    process.join(PATIENCE)
    assert process.exitcode == 0, log.read_text()
    before = last.read_bytes()
    resumed = [*arguments, "trainer.max_epochs=2", "ckpt_path=last"]
    process = FORKS.Process(target=limited, args=(resumed, str(log), {}, None))
    process.start()
    process.join(PATIENCE)
    text = log.read_text()
    assert process.exitcode == 1 and text.splitlines()[-1].startswith("error: cannot write ")
    assert "Traceback" not in text and "MB needed" in text
    assert last.read_bytes() == before


@pytest.mark.thorough
def test_small_file_system_leaves_the_former_checkpoint(tmp_path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.fail("mounting a file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)], check=True)
    try:
        last = tmp_path / "last.ckpt"
        DurableCheckpointIO().save_checkpoint(OLD, last)
        with pytest.raises(SavingError, match=r"No space left.*0\.4 MB needed, 0\.\d MB free") as error:
            DurableCheckpointIO().save_checkpoint(NEW, last)
        assert error.value.errno == errno.ENOSPC
        assert_intact(last)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with pytest.raises(SavingError, match="Read-only file system.*may write to"):
            DurableCheckpointIO().save_checkpoint(OLD, last)
        assert_intact(last)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_text_is_replaced_or_left(tmp_path, room_for_100_kb):
    write_text(tmp_path / "a" / "x.json", "old")
    with pytest.raises(SavingError, match=r"x\.json"):
        write_text(tmp_path / "a" / "x.json", "n" * 200_000)
    with pytest.raises(KeyError), replaced(tmp_path / "a" / "x.json"):
        raise KeyError("not of the disk")
    assert [path.read_text() for path in (tmp_path / "a").iterdir()] == ["old"]


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    old = time.time() - 2 * 24 * 3600
    files = {
        f"last.ckpt.{host}.{dead.pid}.part": True,
        f"last.ckpt.{host}.{os.getpid()}.part": True,  # a number that was given again
        f"last.ckpt.{host}.{os.getppid()}.part": False,
        "last.ckpt.elsewhere.7.part": False,
        "best.ckpt.elsewhere.7.part": True,
        "last.ckpt": False,
        "notes.part": False,
    }
    for name in files:
        (tmp_path / name).write_text(name)
    os.utime(tmp_path / "best.ckpt.elsewhere.7.part", (old, old))
    removed = {path.name for path in remove_stale(tmp_path)}
    assert removed == {name for name, stale in files.items() if stale}
    assert {path.name for path in tmp_path.iterdir()} == files.keys() - removed
    assert remove_stale(tmp_path / "nowhere") == []
