"""Made-up archives of published sets of masks, in the layouts in which they are downloaded."""

import gzip
import io
import tarfile
import zipfile

import numpy as np
from PIL import Image

KINDS = {"jpg": "JPEG", "png": "PNG", "tif": "TIFF", "gif": "GIF", "ppm": "PPM", "bmp": "BMP"}


SHAPE = (8, 10)
"""Height and width of the images, pixels."""


def picture(name, value=None, shape=None):
    """A file's bytes: a colour image, or a mask whose upper half has ``value``."""
    shape = shape or SHAPE
    pixels = np.full((*shape, 3), 90, dtype=np.uint8)
    if value is not None:
        pixels = np.zeros(shape, dtype=np.uint8)
        pixels[: shape[0] // 2] = value
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, KINDS[name.rpartition(".")[2].lower()])
    return file.getvalue()


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return path


def drive(folder, truth=True):
    archives = []
    for part, first in (("training", 21), ("test", 1)):
        files = {}
        for i in range(first, first + 20):
            files[f"{part}/images/{i:02d}_{part}.tif"] = picture("x.tif")
            files[f"{part}/mask/{i:02d}_{part}_mask.gif"] = picture("x.gif", 255)
            if truth or part == "training":
                files[f"{part}/1st_manual/{i:02d}_manual1.gif"] = picture("x.gif", 255)
                files[f"{part}/2nd_manual/{i:02d}_manual2.gif"] = picture("x.gif", 255)
        archives.append(zipped(folder / f"{part}.zip", files))
    return archives


def chase(folder):
    files = {}
    for name in (f"{i:02d}{side}" for i in range(1, 15) for side in "LR"):
        files[f"Image_{name}.jpg"] = picture("x.jpg")
        files[f"Image_{name}_1stHO.png"] = files[f"Image_{name}_2ndHO.png"] = picture("x.png", 255)
    return [zipped(folder / "CHASEDB1.zip", files)]


def stare(folder):
    archives = []
    for archive, ending in (("stare-images", ""), ("labels-ah", ".ah"), ("labels-vk", ".vk")):
        archives.append(folder / f"{archive}.tar")
        with tarfile.open(archives[-1], "w") as tar:
            for i in range(1, 21):
                body = gzip.compress(picture("x.ppm", 255 if ending else None))
                entry = tarfile.TarInfo(f"im{i:04d}{ending}.ppm.gz")
                entry.size = len(body)
                tar.addfile(entry, io.BytesIO(body))
    return archives


def hrf(folder):
    archives = []
    for kind, short in (("healthy", "h"), ("glaucoma", "g"), ("diabetic_retinopathy", "dr")):
        parts = {"": ("", "JPG", None), "_manualsegm": ("", "tif", 255), "_fovmask": ("_mask", "tif", 255)}
        for part, (ending, extension, value) in parts.items():
            body = picture(f"x.{extension.lower()}" if extension != "JPG" else "x.jpg", value)
            files = {f"{i:02d}_{short}{ending}.{extension}": body for i in range(1, 16)}
            archives.append(zipped(folder / f"{kind}{part}.zip", files))
    return archives


def isic2018(folder):
    files = {}
    for number, part in enumerate(["Training", "Validation", "Test"]):
        for i in range(3 - number):
            name = f"ISIC_{number}00000{i}"
            files[f"ISIC2018_Task1-2_{part}_Input/{name}.jpg"] = picture("x.jpg")
            files[f"ISIC2018_Task1_{part}_GroundTruth/{name}_segmentation.png"] = picture("x.png", 255)
    return [zipped(folder / "isic.zip", files)]


def refuge(folder):
    files = {}
    pairs = [("g0001", "Glaucoma/"), ("n0001", "Non-Glaucoma/"), ("V0001", ""), ("T0001", "")]
    for name, kind in pairs:
        files[f"REFUGE/{kind}{name}.jpg"] = picture("x.jpg")
        mask = np.full((8, 10), 255, dtype=np.uint8)
        mask[2:6], mask[3:5] = 128, 0
        file = io.BytesIO()
        Image.fromarray(mask).save(file, "BMP")
        files[f"Annotation/Disc_Cup_Masks/{kind}{name}.bmp"] = file.getvalue()
    return [zipped(folder / "refuge.zip", files)]


def dsb2018(folder):
    files = {}
    for i in range(10):
        name = f"{i:x}abc"
        files[f"{name}/images/{name}.png"] = picture("x.png")
        for part in range(2):
            mask = np.zeros((8, 10), dtype=np.uint8)
            mask[2 * part : 2 * part + 2] = 255
            file = io.BytesIO()
            Image.fromarray(mask).save(file, "PNG")
            files[f"{name}/masks/{part}.png"] = file.getvalue()
    return [zipped(folder / "stage1_train.zip", files)]


def kvasir(folder):
    files = {f"Kvasir-SEG/images/c{i}.jpg": picture("x.jpg") for i in range(10)}
    files |= {f"Kvasir-SEG/masks/c{i}.jpg": picture("x.jpg", 255) for i in range(10)}
    return [zipped(folder / "kvasir-seg.zip", files)]


def cvc(folder):
    files = {f"CVC-ClinicDB/Original/{i}.tif": picture("x.tif") for i in range(1, 101)}
    files |= {f"CVC-ClinicDB/Ground Truth/{i}.tif": picture("x.tif", 255) for i in range(1, 101)}
    inner = zipped(folder / "inner.zip", files).read_bytes()
    return [zipped(folder / "outer.zip", {"CVC-ClinicDB.zip": inner})]
