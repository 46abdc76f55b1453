"""Made-up archives in each published layout, through ``prepare`` and the source."""

import json
import tarfile

import numpy as np
import pytest
from made_up_archives import chase, cvc, drive, dsb2018, hrf, isic2018, kvasir, picture, refuge, stare, zipped

from visionattn.data.layouts import LAYOUTS
from visionattn.data.prepare import prepare
from visionattn.data.prepared import HERSegSplit, PreparedDataset
from visionattn.data.published import preparer

EXPECTED = {  # train, val, test
    "drive": (drive, (16, 4, 20)),
    "chase": (chase, (16, 4, 8)),
    "stare": (stare, (8, 2, 10)),
    "hrf": (hrf, (12, 3, 30)),
    "isic2018": (isic2018, (3, 2, 1)),
    "refuge": (refuge, (2, 1, 1)),
    "dsb2018": (dsb2018, (8, 1, 1)),
    "kvasir": (kvasir, (8, 1, 1)),
    "cvc": (cvc, (50, 25, 25)),
}


def test_every_layout_has_its_archives():
    assert set(EXPECTED) == set(LAYOUTS)


@pytest.mark.parametrize("name", EXPECTED)
def test_published_layout(tmp_path, name):
    make, counts = EXPECTED[name]
    told = []
    output = tmp_path / "out" / name
    complete = name in ("drive", "chase", "stare", "hrf")
    info = prepare(name, make(tmp_path), output, told.append, complete=complete)
    parts = [PreparedDataset(output, split, name=name) for split in ("train", "val", "test")]
    assert tuple(len(part) for part in parts) == counts
    groups = [{part[i].group for i in range(len(part))} for part in parts]
    assert not groups[0] & groups[1] and not groups[2] & (groups[0] | groups[1])
    sample = parts[2][0]
    assert sample.image.shape == (8, 10, 3) and abs(sample.image.astype(int) - 90).max() <= 1
    if name == "refuge":
        assert np.bincount(sample.mask.ravel()).tolist() == [40, 20, 20]
    else:
        assert sample.mask[:4].all() and not sample.mask[4:].any()
    assert (sample.field is not None) == (name in ("drive", "hrf"))
    assert told and info == json.loads((output / "dataset.json").read_text())
    assert all(len(value) == 64 for value in info["sources"].values())
    assert [path.name for path in output.parent.iterdir()] == [name]


def cvc_twice(folder, sequences):
    """Both formats and a table of sequences, the TIFF files damaged, as an archive in circulation has them."""
    files, lines = {}, ["frame_id,sequence_id,png_image_path"]
    for i in range(1, 13):
        files[f"PNG/Original/{i}.png"], files[f"PNG/Ground Truth/{i}.png"] = picture("x.png"), picture("x.png", 255)
        files[f"TIF/Original/{i}.tif"] = files[f"TIF/Ground Truth/{i}.tif"] = b"no image"
        lines += [f"{i},{i % 4},PNG/Original/{i}.png"] if i <= sequences else []
    files["metadata.csv"] = "\n".join(lines).encode()
    return [zipped(folder / "cvc.zip", files)]


def test_cvc_in_two_formats_is_split_by_its_table(tmp_path):
    info = prepare("cvc", cvc_twice(tmp_path, 12), tmp_path / "cvc", complete=False)
    assert info["counts"] == dict(images=12, masks=12, fields=0, empty_masks=0)
    assert info["groups"] == {str(i): str(i % 4) for i in range(1, 13)}
    with pytest.raises(ValueError, match=r"metadata.csv names no group of 2 images, first \['11', '12'\]"):
        prepare("cvc", cvc_twice(tmp_path, 10), tmp_path / "again", complete=False)


def test_usual_splits(tmp_path):
    sets = {}
    for name in ("drive", "chase", "hrf"):
        prepare(name, EXPECTED[name][0](tmp_path), tmp_path / name)
        sets[name] = PreparedDataset(tmp_path / name, "test").names
    assert sets["drive"] == [f"{i:02d}" for i in range(1, 21)]
    assert sets["chase"] == [f"{i}{side}" for i in range(11, 15) for side in "lr"]
    assert "05_h" not in sets["hrf"] and {"06_h", "15_dr", "10_g"} <= set(sets["hrf"])


def test_leave_one_out(tmp_path):
    prepare("stare", stare(tmp_path), tmp_path / "out")
    tested = [PreparedDataset(tmp_path / "out", "test", fold=fold, folds=20).names for fold in range(20)]
    assert sorted(sum(map(tuple, tested), ())) == [f"{i:04d}" for i in range(1, 21)]


def test_truth_of_drives_test_may_be_kept_back(tmp_path):
    info = prepare("drive", drive(tmp_path, truth=False), tmp_path / "out")
    assert len(info["unlabelled"]) == 20
    assert PreparedDataset(tmp_path / "out", "test")[0].mask is None
    assert len(PreparedDataset(tmp_path / "out", "test", fold=0, folds=5)) == 4


def test_bad_archives_are_named(tmp_path):
    output = tmp_path / "out"

    def refused(error, message, archives, name="kvasir", **options):
        with pytest.raises(error, match=message):
            prepare(name, archives, output, **options)
        assert not output.exists() and not list(tmp_path.glob(".out*"))

    whole = kvasir(tmp_path)
    refused(ValueError, "kvasir has 1000 images, the archives hold 10", whole)
    refused(ValueError, "no published set 'kvasr'", whole, name="kvasr")
    with pytest.raises(ValueError, match="did you mean 'kvasir'"):
        preparer("kvasr")
    refused(ValueError, "there are no archives", [])
    refused(FileNotFoundError, "none.zip", [tmp_path / "none.zip"])
    refused(FileNotFoundError, "no image of drive", whole, name="drive")
    (tmp_path / "cut.zip").write_bytes(whole[0].read_bytes()[:200])
    refused(ValueError, "cannot unpack .*cut.zip", [tmp_path / "cut.zip"])
    (tmp_path / "cut.rar").write_bytes(b"x")
    refused(ValueError, "cut.rar is no archive of a known kind", [tmp_path / "cut.rar"])
    evil = zipped(tmp_path / "evil.zip", {"../../images/a.jpg": picture("x.jpg")})
    refused(ValueError, r"evil.zip holds the path '\.\./\.\./images/a.jpg'", [evil])
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        entry = tarfile.TarInfo("images")
        entry.type, entry.linkname = tarfile.SYMTYPE, "../../.."
        tar.addfile(entry)
    refused(ValueError, "cannot unpack .*link.tar", [tmp_path / "link.tar"])
    image, mask = picture("x.jpg"), picture("x.jpg", 255)
    odd = zipped(tmp_path / "odd.zip", {"images/a.jpg": image, "images/b.jpg": image, "masks/a.jpg": mask})
    refused(ValueError, r"1 images have no mask \['b'\]", [odd], complete=False)
    more = zipped(tmp_path / "more.zip", {"images/a.jpg": image, "masks/a.jpg": mask, "other/c.png": picture("x.png")})
    refused(ValueError, r"1 images do not belong to the set, first \['other/c.png'\]", [more], complete=False)
    small = {f"images/{i}.jpg": image for i in "abc"} | {f"masks/{i}.jpg": mask for i in "bc"}
    small["masks/a.jpg"] = picture("x.jpg", 255, shape=(4, 4))
    refused(ValueError, "image is 8 x 10 .* mask 4 x 4", [zipped(tmp_path / "small.zip", small)], complete=False)
    twice = {f"{top}/images/a.jpg": image for top in "pq"} | {"masks/a.jpg": mask}
    refused(ValueError, "1 images occur twice, first 'a'", [zipped(tmp_path / "twice.zip", twice)], complete=False)


def test_damaged_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="visionattn data prepare"):
        PreparedDataset(tmp_path)
    output = tmp_path / "out"
    prepare("kvasir", kvasir(tmp_path), output, complete=False)
    with pytest.raises(FileExistsError, match="exists already"):
        prepare("kvasir", kvasir(tmp_path), output, complete=False)
    with pytest.raises(ValueError, match="'kvasir', expected 'drive'"):
        PreparedDataset(output, name="drive")
    name = PreparedDataset(output, "val").names[0]
    (output / "masks" / f"{name}.png").unlink()
    with pytest.raises(FileNotFoundError, match=f"1 files are missing, first .*{name}.png"):
        PreparedDataset(output, "val")
    (output / "dataset.json").write_text('{"name": "kvasir"}')
    with pytest.raises(ValueError, match="lacks .*classes"):
        PreparedDataset(output)


def test_herseg_split(tmp_path):
    for folder, value in (("image_1024", None), ("mask_1024", 1)):
        (tmp_path / folder).mkdir()
        for name in "abc":
            (tmp_path / folder / f"{name}.png").write_bytes(picture("x.png", value))
    lists = dict(train=["a.png"], valid=["b.x.png"], test=["c.jpg"])
    (tmp_path / "polyp_data_split.json").write_text(json.dumps(lists))
    sample = HERSegSplit(tmp_path, "polyp", "val")[0]
    assert sample.name == "b" and sample.mask.sum() == 40
    (tmp_path / "polyp_data_split.json").write_text(json.dumps(lists | dict(test=["a.png"])))
    with pytest.raises(ValueError, match="in train and in test, first 'a'"):
        HERSegSplit(tmp_path, "polyp")
    (tmp_path / "polyp_data_split.json").write_text(json.dumps(lists | dict(train=["d.png"])))
    with pytest.raises(FileNotFoundError, match=r"d.png"):
        HERSegSplit(tmp_path, "polyp")
