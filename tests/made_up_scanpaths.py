"""Made-up archives of sets of scanpaths, in the layouts in which they are downloaded."""

import json

import numpy as np
from made_up_archives import picture, zipped
from PIL import Image


def amazon(folder, masks=False, count=3):
    table, files = {}, {}
    for i in range(1, count + 1):
        table[f"{i}.jpg"] = dict(
            fixations={str(v): [[5 + 10 * v, 5], [75, 35], [75, 36 + i]] for v in range(1, 7)},
            ground_truth=[dict(xmin=71, xmax=79, ymin=31, ymax=38)],
            size=dict(width=140, height=60),
            target="target_0.jpg",
        )
        files[f"AmazonCovers/images/{i}.jpg"] = picture("x.jpg", shape=(60, 140))
        if masks:
            mask = np.zeros((60, 140), dtype=np.uint8)
            for row in range(6):
                for col in range(14):
                    mask[row * 10 + 1 : row * 10 + 9, col * 10 + 1 : col * 10 + 8] = 255
            Image.fromarray(mask).save(folder / "m.png")
            files[f"AmazonCovers/binarymask/14x6-{i}.png"] = (folder / "m.png").read_bytes()
    if masks:
        table = {name.replace(".jpg", ".png"): entry for name, entry in table.items()}
        for i in range(1, count + 1):
            files[f"AmazonCovers/images/{i}.png"] = picture("x.png", shape=(60, 140))
            del files[f"AmazonCovers/images/{i}.jpg"]
    files["AmazonCovers/Amazon.json"] = json.dumps(table)
    return [zipped(folder / "sti.zip", files)]


def shelves(folder):
    rows = ["ID,Target,Question,Choice,X,Y,T_Package,Sub_ID"]
    for item in range(1, 5):
        for viewer in ("s1", "s2"):
            for x, y in ((80, 200), (240, 700), (1400, 900)):
                rows.append(f"{item},t,Q1,3,{x},{y},4,{viewer}")
    files = {"fixations.csv": "\n".join(rows)}
    files |= {f"Q1/{item}.png": picture("x.png", shape=(1050, 1680)) for item in range(1, 5)}
    return [zipped(folder / "shelves.zip", files)]


def cocosearch18(folder):
    trials, files = [], {}
    for number, split in enumerate(["train", "train", "valid"]):
        name = f"00000{number}.jpg"
        files[f"images/stop sign/{name}"] = picture("x.jpg", shape=(1050, 1680))
        for subject in (1, 2, 3):
            xs = [840, 100.5, 500, 1600][: 1 if subject == 3 else 4]
            trials.append(
                dict(name=name, subject=subject, task="stop sign", condition="present", bbox=[1550, 900, 90, 80], X=xs)
                | dict(Y=[525, 90, 600, 940][: len(xs)], T=[200] * len(xs), length=len(xs), split=split)
                | dict(correct=int(subject != 2 or number != 0), RT=900)
            )
    trials.append(trials[0] | dict(subject=9, condition="absent", bbox=None))
    files["coco_search18_fixations_TP_train_split1.json"] = json.dumps(trials)
    return [zipped(folder / "coco.zip", files)]


def mit1003(folder, kind="csv"):
    files = {f"ALLSTIMULI/i{k}.jpeg": picture("x.jpg", shape=(48, 64)) for k in range(4)}
    points = {f"i{k}.jpeg": {v: [[10, 10], [60, 44], [30, 20]] for v in ("hp", "ems")} for k in range(4)}
    if kind == "json":
        points["i0.jpeg"]["none"] = []
        files["fixations.json"] = json.dumps(points)
    else:
        rows = [f"{name},{v},{x},{y}" for name, each in points.items() for v, path in each.items() for x, y in path]
        files["fixations.csv"] = "\n".join(["image,subject,x,y", *rows])
    return [zipped(folder / "mit.zip", files)]
