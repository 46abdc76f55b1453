"""How published segmentation sets are laid out in the archives that their makers hand out, and how they are split.

Patterns match the end of a file's path inside the archives, in lower case. The retinal sets follow what
mmsegmentation's converters expect (github.com/open-mmlab/mmsegmentation, tools/dataset_converters); names and values of
the others were compared with the loaders of several public repositories, not with the archives.
``docs/segmentation_data.md`` tells them in words.
"""

from collections.abc import Callable
from dataclasses import dataclass

from visionattn.data.splits import split_groups

Splits = dict[str, list[int]]


@dataclass(frozen=True)
class Layout:
    """One published set.

    Args:
        classes: Names in label order.
        image: Pattern of an image's path, with the group ``id``.
        mask: Pattern of a mask's path, with the group ``id``.
        counts: Number of images of the whole set.
        split: Identifiers, sorted, and their groups to splits.
        group: Identifier to patient or other unit.
        group_table: Name of a CSV file which, if it is there, knows the groups better: its column of image paths and
            that of groups.
        field: Pattern of a field-of-view mask.
        ignored: Pattern of files that belong to the set and are not used.
        copies: Pattern of files that give way where the archive has their image in another format too.
        values: Mask value to label, for masks that are neither binary nor labels.
        threshold: Smallest foreground value of binary masks.
        unlabelled: Whether images without mask are taken along (a test split whose truth is kept back).
        instances: Whether an image has a mask for each instance, which are united.
        note: What a user should know of the split.
    """

    classes: tuple[str, ...]
    image: str
    mask: str
    counts: int
    split: Callable[[list[str], list[str]], Splits]
    group: Callable[[str], str] = str
    field: str | None = None
    group_table: tuple[str, str, str] | None = None
    ignored: str | None = None
    copies: str | None = None
    values: tuple[tuple[int, int], ...] = ()
    threshold: int | None = None
    unlabelled: bool = False
    instances: bool = False
    note: str = ""


def _held_out(is_test: Callable[[int, str], bool], val: float = 0.2) -> Callable[[list[str], list[str]], Splits]:
    """Split with a given test part; validation is the share ``val`` of the other groups, fixed."""

    def split(names: list[str], groups: list[str]) -> Splits:
        test = [i for i, name in enumerate(names) if is_test(i, name)]
        rest = [i for i, name in enumerate(names) if not is_test(i, name)]
        if len({groups[i] for i in rest}) < 2:
            return dict(train=rest, val=[], test=test)
        inner = split_groups([groups[i] for i in rest], val=val, test=0.0)
        return dict(train=[rest[i] for i in inner["train"]], val=[rest[i] for i in inner["val"]], test=test)

    return split


def _random(names: list[str], groups: list[str]) -> Splits:
    if len(set(groups)) < 3:
        raise ValueError(f"{len(set(groups))} groups are too few for three splits, expected at least 3")
    return split_groups(groups, val=0.1, test=0.1)


def _by_prefix(train: str, val: str, test: str) -> Callable[[list[str], list[str]], Splits]:
    def split(names: list[str], groups: list[str]) -> Splits:
        prefixes = dict(train=train, val=val, test=test)
        return {key: [i for i, n in enumerate(names) if n.startswith(prefix)] for key, prefix in prefixes.items()}

    return split


def _isic(name: str) -> str:
    return name.partition("_")[2]


_POLYP = ("background", "polyp")
_VESSEL = ("background", "vessel")

LAYOUTS: dict[str, Layout] = {
    "drive": Layout(
        _VESSEL,
        image=r"(?:training|test)/images/(?P<id>\d+)_(?:training|test)\.tif",
        mask=r"(?:training|test)/1st_manual/(?P<id>\d+)_manual1\.(?:gif|png|tif)",
        field=r"(?:training|test)/mask/(?P<id>\d+)_(?:training|test)_mask\.(?:gif|png|tif)",
        ignored=r"2nd_manual/[^/]+",
        counts=40,
        split=_held_out(lambda i, name: int(name) <= 20),
        unlabelled=True,
        note="test: images 01 to 20, training: 21 to 40, as published; validation: 4 of the training images",
    ),
    "chase": Layout(
        _VESSEL,
        image=r"image_(?P<id>\d+[lr])\.jpg",
        mask=r"image_(?P<id>\d+[lr])_1stho\.png",
        ignored=r"image_\d+[lr]_2ndho\.png",
        counts=28,
        group=lambda name: name[:-1],
        split=_held_out(lambda i, name: int(name[:-1]) > 10),
        note="training: the first 20 images (children 01 to 10), test: the last 8; validation: 2 training children. "
        "The set has no field-of-view masks: the whole image counts",
    ),
    "stare": Layout(
        _VESSEL,
        image=r"im(?P<id>\d{4})\.ppm",
        mask=r"im(?P<id>\d{4})\.ah\.ppm",
        ignored=r"im\d{4}\.vk\.ppm",
        counts=20,
        split=_held_out(lambda i, name: i >= 10),
        note="training: the first 10 images, test: the last 10; validation: 2 of the training images; leave-one-out "
        "by folds=20. The set has no field-of-view masks: the whole image counts",
    ),
    "hrf": Layout(
        _VESSEL,
        image=r"(?P<id>\d+_(?:h|g|dr))\.jpg",
        mask=r"(?P<id>\d+_(?:h|g|dr))\.tif",
        field=r"(?P<id>\d+_(?:h|g|dr))_mask\.tif",
        counts=45,
        split=_held_out(lambda i, name: int(name.partition("_")[0]) > 5),
        note="training: the first 5 of each kind, test: the other 30; validation: 3 of the training images",
    ),
    "isic2018": Layout(
        ("background", "lesion"),
        image=r"isic2018_task1-2_(?P<part>training|validation|test)_input/isic_(?P<id>\d{7})\.jpg",
        mask=r"isic2018_task1_(?P<part>training|validation|test)_groundtruth/isic_(?P<id>\d{7})_segmentation\.png",
        counts=3694,
        group=_isic,
        split=_by_prefix("training_", "validation_", "test_"),
        note="training 2594, validation 100, test 1000 images, as published",
    ),
    "refuge": Layout(
        ("background", "disc", "cup"),
        image=r"(?P<id>[gnvt]\d{4})\.jpg",
        mask=r"(?P<id>[gnvt]\d{4})\.bmp",
        values=((255, 0), (128, 1), (0, 2)),
        counts=1200,
        split=lambda names, groups: {
            "train": [i for i, name in enumerate(names) if name[0] in "gn"],
            "val": [i for i, name in enumerate(names) if name[0] == "v"],
            "test": [i for i, name in enumerate(names) if name[0] == "t"],
        },
        note="400 training (g, n), 400 validation (V), 400 test (T) images, as published; a mask's disc is the rim "
        "without the cup",
    ),
    "dsb2018": Layout(
        ("background", "nucleus"),
        image=r"(?P<id>[0-9a-f]+)/images/(?P=id)\.png",
        mask=r"(?P<id>[0-9a-f]+)/masks/[0-9a-f]+\.png",
        counts=670,
        instances=True,
        split=_random,
        note="stage 1 training images, split 80/10/10 at random; the instances of an image are united. The set "
        "names no patients: similar images of one experiment may be in two splits",
    ),
    "kvasir": Layout(
        _POLYP,
        image=r"images/(?P<id>[^/]+)\.jpg",
        mask=r"masks/(?P<id>[^/]+)\.jpg",
        threshold=128,
        counts=1000,
        split=_random,
        note="split 80/10/10 at random; the set names no patients",
    ),
    "cvc": Layout(
        _POLYP,
        image=r"original/(?P<id>\d+)\.(?:tif|png)",
        mask=r"ground truth/(?P<id>\d+)\.(?:tif|png)",
        threshold=128,
        counts=612,
        copies=r"(?:original|ground truth)/\d+\.tif",
        group=lambda name: str((int(name) - 1) // 25),
        group_table=("metadata.csv", "png_image_path", "sequence_id"),
        split=_random,
        note="split 80/10/10 at random by the 29 sequences of metadata.csv, or without that file by runs of 25 "
        "neighbouring frames, which can cut a sequence where a run ends",
    ),
}
