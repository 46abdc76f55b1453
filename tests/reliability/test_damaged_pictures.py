"""Pictures of every unusual kind are read, damaged ones are listed by path, and the training ends either way."""

import fcntl
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from processes import make_pictures, training

from visionattn.cli import main
from visionattn.tasks.callbacks import SkippedImages

PLAIN = ["trainer.max_epochs=1", "data.workers=1", "task.ema_decay=null"]


def huge_png():
    """The header of a picture of 30,000 x 30,000 pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def add_unusual(folder):
    """Readable pictures of unusual kinds."""
    colours = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 48, 3), dtype=np.uint8))
    colours.convert("CMYK").save(folder / "cmyk.jpg")
    colours.convert("P").save(folder / "palette.png")
    colours.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(np.full((40, 48), 40_000, dtype=np.uint16)).save(folder / "16bit.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    colours.save(folder / "turned.jpg", exif=exif)
    colours.resize((1, 1)).save(folder / "pixel.png")


def add_damaged(folder):
    """Damaged files; their paths."""
    whole = (folder / "0.png").read_bytes()
    contents = {
        "empty.png": b"",
        "text.jpg": b"not a picture",
        "half.png": whole[: len(whole) // 2],
        "page.jpg": b"<!DOCTYPE html><title>404</title>",
        "huge.png": huge_png(),
        "bad\udcff.png": b"",  # a name that is no text
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return sorted(str(folder / name) for name in contents)


def listed(run):
    text = (run / "skipped_images.txt").read_text(encoding="utf-8", errors="surrogateescape")
    return text.splitlines()


def test_processes_list_a_picture_once(tmp_path, caplog):
    trainer = SimpleNamespace(is_global_zero=True)
    for names in (["a", "b\udcff"], ["b\udcff", "c"]):  # a run and its resume
        ranks = [SkippedImages(tmp_path) for _ in range(2)]
        for note in [*names, *names]:
            for rank in ranks:
                rank.on_train_batch_end(trainer, None, None, dict(skipped=[f"{note}:\nbroken"]), 0)
    assert listed(tmp_path) == ["a: broken", "b\udcff: broken", "c: broken"]
    with caplog.at_level("INFO"):
        SkippedImages(tmp_path).on_fit_end(trainer, None)
    assert "3 unreadable images" in caplog.text


def test_process_waits_for_another_that_writes_the_list(tmp_path):
    rank, batch = SkippedImages(tmp_path), dict(skipped=["a: broken"])
    with ThreadPoolExecutor(1) as pool, (tmp_path / "skipped_images.txt").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        noting = pool.submit(rank.on_validation_batch_end, None, None, None, batch)
        assert wait([noting], timeout=0.2).not_done
        file.write("a: broken\n")
        file.close()
        noting.result(20)
    assert listed(tmp_path) == ["a: broken"]


def test_damaged_pictures_are_listed_once(tmp_path):
    pictures = make_pictures(tmp_path / "pictures")
    add_unusual(pictures / "train" / "cat")
    main(training(pictures, tmp_path, "good", *PLAIN))
    assert not (tmp_path / "good" / "skipped_images.txt").exists()
    damaged = add_damaged(pictures / "train" / "dog")
    with pytest.raises(SystemExit, match=r"cannot read image .*data.on_error=skip"):
        main(training(pictures, tmp_path, "bad", *PLAIN))
    for changes in (["overwrite=true"], ["ckpt_path=last", "trainer.max_epochs=2"]):  # a resumed run repeats none
        main(training(pictures, tmp_path, "bad", *PLAIN, "data.on_error=skip", *changes))
        lines = listed(tmp_path / "bad")
        assert len(lines) == len(damaged)
        assert all(any(path in line for line in lines) for path in damaged)
