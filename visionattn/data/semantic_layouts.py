"""The sets of labelled scenes: classes, colours, values of their label files, and where the files lie.

- ADE20K, scene parsing benchmark (Zhou et al., CVPR 2017; groups.csail.mit.edu/vision/datasets/ADE20K): value 0 is
  not counted, 1 to 150 are the classes.
- Cityscapes, fine annotations (Cordts et al., CVPR 2016, arXiv:1604.01685; github.com/mcordts/cityscapesScripts): of
  the 34 label ids 19 are evaluated.
- COCO-Stuff (Caesar et al., CVPR 2018, arXiv:1612.03716; github.com/nightrome/cocostuff): 80 things and 91 stuff
  classes of 182 numbers, of which 11 things were never annotated; files hold the number less 1.

Class names and the colours of ADE20K and Cityscapes are their makers'.
"""

from dataclasses import dataclass

import numpy as np

from visionattn.data.segmentation import IGNORE

UNKNOWN = 254
"""Entry of a table for values that no label file of the set may have."""

Color = tuple[int, int, int]


@dataclass(frozen=True)
class SemanticLayout:
    """One set.

    Args:
        classes: Names in label order; there is no background.
        palette: Colour of each class.
        values: Value of a label file for each class, in label order.
        ignored: Values that are not counted.
        image: Pattern of an image's path in lower case, with the groups ``split`` and ``id``.
        label: Pattern of its label file.
        parts: The split that each ``split`` of the patterns is.
        counts: Number of images of each split.
        archives: The files to download, in words.
    """

    classes: tuple[str, ...]
    palette: tuple[Color, ...]
    values: tuple[int, ...]
    ignored: tuple[int, ...]
    image: str
    label: str
    parts: dict[str, str]
    counts: dict[str, int]
    archives: str

    def table(self) -> np.ndarray:
        """Label of every value, ``[256]`` uint8: ``IGNORE`` where it is not counted, ``UNKNOWN`` where it is wrong."""
        table = np.full(256, UNKNOWN, np.uint8)
        table[list(self.ignored)] = IGNORE
        table[list(self.values)] = np.arange(len(self.values))
        return table


def color_map(count: int) -> tuple[Color, ...]:
    """Colours of any number of classes, as far apart as PASCAL VOC's, which they are without its black background."""

    def spread(number: int, channel: int) -> int:
        return sum(((number >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8))

    return tuple((spread(i, 0), spread(i, 1), spread(i, 2)) for i in range(1, count + 1))


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


def _colors(text: str) -> tuple[Color, ...]:
    return tuple((code[0], code[1], code[2]) for code in map(bytes.fromhex, text.split()))


_ADE20K = _names("""
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel,
pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood,
sconce, vase, traffic light, tray, ashcan, fan, pier, CRT screen, plate, monitor, bulletin board, shower, radiator,
glass, clock, flag
""")
_ADE20K_COLORS = _colors("""
787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652
8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0
ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff
8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff
00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff
ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff
00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070
5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500
0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff
b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
""")
_CITYSCAPES = _names("""
road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, rider,
car, truck, bus, train, motorcycle, bicycle
""")
_CITYSCAPES_COLORS = _colors("""
804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64
005064 0000e6 770b20
""")
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_COCO_STUFF = _names("""
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking
meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot
dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other,
ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble,
floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel,
ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper,
pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug,
salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table,
tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone,
wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
""")
_NOT_ANNOTATED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # street sign, hat, shoe, eye glasses, plate and others

LAYOUTS: dict[str, SemanticLayout] = {
    "ade20k": SemanticLayout(
        _ADE20K,
        _ADE20K_COLORS,
        values=tuple(range(1, 151)),
        ignored=(0,),
        image=r"images/(?P<split>training|validation)/(?P<id>ade_(?:train|val)_\d{8})\.jpg",
        label=r"annotations/(?P<split>training|validation)/(?P<id>ade_(?:train|val)_\d{8})\.png",
        parts=dict(training="train", validation="val"),
        counts=dict(train=20210, val=2000),
        archives="ADEChallengeData2016.zip",
    ),
    "cityscapes": SemanticLayout(
        _CITYSCAPES,
        _CITYSCAPES_COLORS,
        values=_CITYSCAPES_IDS,
        ignored=(*(i for i in range(34) if i not in _CITYSCAPES_IDS), 255),
        image=r"leftimg8bit/(?P<split>train|val)/[^/]+/(?P<id>[a-z-]+_\d{6}_\d{6})_leftimg8bit\.png",
        label=r"gtfine/(?P<split>train|val)/[^/]+/(?P<id>[a-z-]+_\d{6}_\d{6})_gtfine_labelids\.png",
        parts=dict(train="train", val="val"),
        counts=dict(train=2975, val=500),
        archives="leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip",
    ),
    "coco_stuff": SemanticLayout(
        _COCO_STUFF,
        color_map(171),
        values=tuple(i for i in range(182) if i not in _NOT_ANNOTATED),
        ignored=(255,),
        image=r"(?P<split>train|val)2017/(?P<id>\d{12})\.jpg",
        label=r"(?P<split>train|val)2017/(?P<id>\d{12})\.png",
        parts=dict(train="train", val="val"),
        counts=dict(train=118287, val=5000),
        archives="train2017.zip, val2017.zip and stuffthingmaps_trainval2017.zip",
    ),
}
