"""DICOM files and NIfTI volumes that the tests write."""

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless, generate_uid

from visionattn.data import volumes
from visionattn.data.volumes import DicomSlices, NiftiSlices, read_dicom, window_values


def write_dicom(path, pixels, spacing=(0.5, 0.75), window=(40, 400), syntax=ExplicitVRLittleEndian, **tags):
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = syntax
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    if spacing:
        dataset.PixelSpacing = list(spacing)
    if window:
        dataset.WindowCenter, dataset.WindowWidth = window
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    data = pixels.astype("<u2").tobytes()
    dataset.PixelData = pydicom.encaps.encapsulate([data]) if syntax.is_compressed else data
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_dicom_is_rescaled_and_windowed(tmp_path):
    # -160, 40, 240 and 1000 Hounsfield units
    stored = np.array([[864, 1064, 1264, 2024]], dtype=np.uint16)
    path = write_dicom(tmp_path / "slice.dcm", stored)
    image, spacing = read_dicom(path)
    assert image.dtype == np.float32 and np.allclose(image, [[0, 0.5, 1, 1]]) and spacing == (0.5, 0.75)
    assert np.allclose(read_dicom(path, [540, 1000])[0], [[0, 0, 0.2, 0.96]])
    turned = write_dicom(tmp_path / "turned.dcm", stored, PhotometricInterpretation="MONOCHROME1")
    assert np.allclose(read_dicom(turned)[0], [[1, 0.5, 0, 0]])
    plain = read_dicom(write_dicom(tmp_path / "plain.dcm", stored, window=None))[0]
    assert plain.min() == 0 and plain.max() == 1


def test_bad_dicom_is_named(tmp_path):
    pixels = np.zeros((4, 4), dtype=np.uint16)
    with pytest.raises(ValueError, match="bare.dcm has no PixelSpacing"):
        read_dicom(write_dicom(tmp_path / "bare.dcm", pixels, spacing=None))
    with pytest.raises(ValueError, match=r"(?s)cannot decode .*packed.dcm \(JPEG-LS.*install a decoder"):
        read_dicom(write_dicom(tmp_path / "packed.dcm", pixels, syntax=JPEGLSLossless))
    (tmp_path / "text.dcm").write_text("no image")
    with pytest.raises(ValueError, match="text.dcm as DICOM"):
        read_dicom(tmp_path / "text.dcm")
    with pytest.raises(FileNotFoundError, match="none.dcm"):
        read_dicom(tmp_path / "none.dcm")
    with pytest.raises(ValueError, match=r"window=\[40, 0\]"):
        window_values(pixels, [40, 0])


def make_series(root, patients=8, slices=3):
    for patient in range(patients):
        for number in range(slices):
            name = f"p{patient}/{number:02d}"
            write_dicom(root / "images" / f"{name}.dcm", np.full((6, 5), 1000 + number, dtype=np.uint16))
            mask = np.zeros((6, 5), dtype=np.uint16)
            mask[number] = 1
            if patient % 2:
                write_dicom(root / "masks" / f"{name}.dcm", mask, RescaleIntercept=0)
            else:
                (root / "masks" / f"p{patient}").mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.uint8(mask * 255)).save(root / "masks" / f"{name}.png")


def test_series_are_split_by_patient(tmp_path):
    make_series(tmp_path)
    parts = [DicomSlices(tmp_path, split, in_chans=3) for split in ("train", "val", "test")]
    groups = [{part[i].group for i in range(len(part))} for part in parts]
    assert [len(part) for part in parts] == [18, 3, 3] and len(set.union(*groups)) == 8
    for part in parts:
        for i in range(len(part)):
            sample = part[i]
            assert sample.image.shape == (6, 5, 3) and sample.spacing == (0.5, 0.75)
            assert sample.mask[int(sample.name[-2:])].all() and sample.mask.sum() == 5
    (tmp_path / "masks" / "p0" / "00.png").unlink()
    with pytest.raises(ValueError, match=r"1 images have no mask \['p0/00'\]"):
        DicomSlices(tmp_path)


def test_patient_of_loose_files_is_read_from_them(tmp_path):
    (tmp_path / "masks").mkdir()
    for number in range(12):
        name, pixels = f"{number:02d}", np.zeros((4, 4), dtype=np.uint16)
        write_dicom(tmp_path / "images" / f"{name}.dcm", pixels, PatientID=f"p{number // 3}")
        Image.fromarray(np.uint8(pixels)).save(tmp_path / "masks" / f"{name}.png")
    parts = [DicomSlices(tmp_path, split) for split in ("train", "val", "test")]
    assert [{part[i].group for i in range(len(part))} for part in parts] != [set()] * 3
    assert [len(part) for part in parts] == [6, 3, 3]
    with pytest.raises(ValueError, match="split 'val' .* is empty"):
        DicomSlices(tmp_path, "val", val=0)


def write_nifti(path, values, zooms=(0.7, 0.8, 2.5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([*zooms, 1.0])), path)


def test_nifti_slices(tmp_path):
    for split in ("train", "val"):
        values = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
        mask = np.zeros((4, 5, 6), dtype=np.uint8)
        mask[1, 2, 3] = 2
        write_nifti(tmp_path / split / "images" / "case_1.nii.gz", values)
        write_nifti(tmp_path / split / "masks" / "case_1.nii.gz", mask)
    classes = ["background", "liver", "tumour"]
    source = NiftiSlices(tmp_path, "val", classes, window=[60, 120])
    assert len(source) == 6
    sample = source[3]
    assert sample.image.shape == (4, 5, 1) and sample.mask[1, 2] == 2 and sample.mask.sum() == 2
    assert sample.spacing == pytest.approx((0.7, 0.8)) and sample.name == "case_1_0003"
    assert np.allclose(sample.image[..., 0] * 120, values[..., 3])
    assert len(NiftiSlices(tmp_path, "val", classes, axis=0, keep_empty=False)) == 4  # evaluation takes all
    front = NiftiSlices(tmp_path, "train", classes, axis=0, keep_empty=False)
    assert len(front) == 1 and front[0].mask[2, 3] == 2 and front[0].spacing == pytest.approx((0.8, 2.5))
    with pytest.raises(ValueError, match=r"outside the 2 classes: \[2"):
        NiftiSlices(tmp_path, "val")[3]
    write_nifti(tmp_path / "val" / "masks" / "case_1.nii.gz", np.uint8(mask // 2 * 255))
    volumes._volume.cache_clear()
    with pytest.raises(ValueError, match="values 0 and 255, expected 0 and 1; write 1 for 'foreground'"):
        NiftiSlices(tmp_path, "val")[3]
    write_nifti(tmp_path / "train" / "masks" / "case_1.nii.gz", mask[:3])
    with pytest.raises(ValueError, match=r"shape \(4, 5, 6\), its label map .* \(3, 5, 6\)"):
        NiftiSlices(tmp_path, "train", classes)
    with pytest.raises(ValueError, match="axis=3"):
        NiftiSlices(tmp_path, "val", classes, axis=3)
    (tmp_path / "val" / "images" / "case_1.nii.gz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="case_1.nii.gz as NIfTI"):
        NiftiSlices(tmp_path, "val", classes)
