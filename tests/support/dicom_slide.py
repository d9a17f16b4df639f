"""Writes a whole slide as DICOM: one file a level, tiles in full, uncompressed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage, generate_uid

TILE = 64


def write_dicom_slide(
    folder: Path, levels: Sequence[np.ndarray], um_per_px: tuple[float, float]
) -> list[Path]:
    """Write levels (H, W, 3) uint8 to files of one series; height and width of level 0's pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    series, frame = generate_uid(), generate_uid()
    paths = []
    for k, pixels in enumerate(levels):
        data = _file(series, frame)
        data.ImageType = ['DERIVED', 'PRIMARY', 'VOLUME', 'RESAMPLED' if k else 'NONE']
        data.InstanceNumber = k + 1
        step = levels[0].shape[0] / pixels.shape[0]
        _describe(data, pixels.shape[:2], [um * step / 1000 for um in um_per_px])
        _fill(data, pixels)
        paths.append(folder / f'{k}.dcm')
        data.save_as(paths[-1], enforce_file_format=True)
    return paths


def _file(series: str, frame: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset('', {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID = meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.FrameOfReferenceUID = series, frame
    data.StudyInstanceUID, data.Modality = generate_uid(), 'SM'
    return data


def _describe(data: FileDataset, hw: tuple[int, int], mm_per_px: list[float]) -> None:
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = hw
    data.ImagedVolumeHeight, data.ImagedVolumeWidth = hw[0] * mm_per_px[0], hw[1] * mm_per_px[1]
    data.DimensionOrganizationType = 'TILED_FULL'
    data.NumberOfOpticalPaths = data.TotalPixelMatrixFocalPlanes = 1
    path, spacing, shared = Dataset(), Dataset(), Dataset()
    path.OpticalPathIdentifier = '1'
    spacing.PixelSpacing, spacing.SliceThickness = [f'{mm:.8f}' for mm in mm_per_px], 0.001
    shared.PixelMeasuresSequence = [spacing]
    data.OpticalPathSequence, data.SharedFunctionalGroupsSequence = [path], [shared]


def _fill(data: FileDataset, pixels: np.ndarray) -> None:
    height, width = pixels.shape[:2]
    rows, columns = -(-height // TILE), -(-width // TILE)
    whole = np.zeros((rows * TILE, columns * TILE, 3), np.uint8)
    whole[:height, :width] = pixels
    tiles = whole.reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2)
    data.Rows = data.Columns = TILE
    data.NumberOfFrames, data.SamplesPerPixel = rows * columns, 3
    data.PhotometricInterpretation, data.PlanarConfiguration = 'RGB', 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.PixelData = tiles.tobytes()
    data['PixelData'].VR = 'OB'
