"""Made-up archives of published sets of masks and questions, in the layouts in which they are downloaded."""

import gzip
import io
import json
import tarfile
import zipfile

import numpy as np
from PIL import Image
from scipy.io import savemat

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


def _bytes(write, *args, **kwargs):
    file = io.BytesIO()
    write(file, *args, **kwargs)
    return file.getvalue()


def vizwiz(folder):
    """Answer grounding: one question an image, five images of each split."""
    files, lists = {}, {}
    for split in ("train", "val"):
        for i in range(5):
            stem = f"VizWiz_{split}_{i:08d}"
            files[f"{split}/{stem}.jpg"] = picture("x.jpg")
            files[f"binary_masks_png/{split}/{stem}.png"] = picture("x.png", 255)
            answers = dict(answers=["tea"] * 2, most_common_answer="tea", height=SHAPE[0], width=SHAPE[1])
            lists.setdefault(split, {})[f"{stem}.jpg"] = dict(question=f"what is this {i}?", **answers)
        files[f"{split}_grounding.json"] = json.dumps(lists[split])
    return [zipped(folder / "vizwiz.zip", files)]


def textvqa_x(folder):
    half = np.zeros(SHAPE, np.uint8)
    half[: SHAPE[0] // 2] = 1
    masks = {f"seg/{i}.npy": _bytes(np.save, half) for i in range(6)}
    with tarfile.open(folder / "seg.tar.gz", "w:gz") as tar:
        for name, body in masks.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))
    shown = {str(i): dict(image=f"a{i // 2}.jpg", explanation=["it", "says", "so"]) for i in range(6)}
    asked = [dict(question_id=i, question=f"what brand is number {i}?", answers=["x"] * 3) for i in range(6)]
    files = {
        "data_splits/train_id.txt": "0\n1\n2\n3\n",
        "data_splits/val_id.txt": "4\n5\n",
        "text_explanations/explanations_token.json": json.dumps(shown),
        "visual_explanations/seg.tar.gz": (folder / "seg.tar.gz").read_bytes(),
    }
    texts = {"TextVQA_0.5.1_train.json": json.dumps(dict(data=asked))}
    images = {f"train_images/a{i}.jpg": picture("x.jpg") for i in range(3)}
    return [zipped(folder / "textvqa_x.zip", files), zipped(folder / "textvqa.zip", texts | images)]


def vqs(folder):
    half = np.zeros(SHAPE, np.uint8)
    half[: SHAPE[0] // 2] = 1
    files = {}
    for part, title in (("train", "Train"), ("val", "Val")):
        regions, questions = [], []
        for image in range(3):
            stem = f"COCO_{part}2014_{image:012d}"
            files[f"{part}2014/{stem}.jpg"] = picture("x.jpg")
            for k in (1, 3):
                files[f"{part}_ground/{stem}.jpg_{k}.mat"] = _bytes(savemat, dict(ground_mask=half))
                regions.append(f"somewhere/else/{stem}_{k}.jpg 0")
                questions.append(f"What is the dog {k} doing?")
        files[f"region{title}List.txt"] = "\n".join(regions)
        files[f"region{title}OuestionList.txt"] = "\n".join(questions)
    return [zipped(folder / "vqs.zip", files)]


def vqa_x(folder):
    half = np.zeros(SHAPE, np.float32)
    half[: SHAPE[0] // 2] = 0.8
    files, questions = {}, []
    for split in ("val", "test"):
        for i in range(6):
            number = i + 10 * (split == "test")
            questions.append(dict(question_id=1000 + number, image_id=number, question=f"is this the {number}th?"))
            files[f"visual/{split}/{1000 + number}.npy"] = _bytes(np.save, half)
            files[f"val2014/COCO_val2014_{number:012d}.jpg"] = picture("x.jpg")
    answers = [dict(question_id=q["question_id"], multiple_choice_answer="yes") for q in questions]
    files["Questions/v2_OpenEnded_mscoco_val2014_questions.json"] = json.dumps(dict(questions=questions))
    files["Annotations/v2_mscoco_val2014_annotations.json"] = json.dumps(dict(annotations=answers))
    return [zipped(folder / "vqa_x.zip", files)]
