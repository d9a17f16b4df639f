"""What napari saves: the folder of a case, with the image and a label map for each class.

In: layers as napari hands them over. Out: image.tif and class{k}.tif. Invariant: which class a
layer is, is said by its metadata or its name, never guessed; files appear whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import CellSegError, ImageError, LabelMapError
from cellseg_mm.data.case_writer import write_image, write_label_map
from cellseg_mm.viewers.napari_reader import CLASS_NUMBER, LayerData

MAX_ID = 2**31 - 1


def write_case(path: str, layers: Sequence[LayerData]) -> list[str]:
    """Write layers into the folder of a case.

    Args:
        path: Folder, made if it is not there. Of one that is, only what is given is replaced.
        layers: At most one image, and a layer of labels for each class. Its class is the number in
            its metadata (layers that this package opened), or at the end of its name: ``class 2``.

    Returns:
        The files that were written.

    Raises:
        CellSegError: A layer's class is not known or given twice, sizes differ, or there is no
            image.
    """
    folder = Path(path)
    label_maps: dict[int, NDArray[np.integer[Any]]] = {}
    image = None
    for data, attributes, kind in layers:
        name = str(attributes.get('name', ''))
        data = data[0] if attributes.get('multiscale') else data
        if kind == 'image':
            image = _picture(name, np.asarray(data))
            continue
        number = _class_number(name, attributes)
        if number in label_maps:
            raise CellSegError(
                f'layer {name}: is class {number}, as another one; expected one layer for each '
                f'class; merge them, or rename one'
            )
        label_maps[number] = _label_map(name, np.asarray(data))
    _check(folder, image, label_maps)
    written = []
    if image is not None:
        written.append(folder / 'image.tif')
        write_image(written[0], image)
    for number, label_map in sorted(label_maps.items()):
        target = folder / f'class{number}.tif'
        if label_map.any():
            write_label_map(target, label_map)
            written.append(target)
        else:  # a class without cells has no file
            target.unlink(missing_ok=True)
    return [str(target) for target in written]


def _class_number(name: str, attributes: dict[str, Any]) -> int:
    number = (attributes.get('metadata') or {}).get(CLASS_NUMBER)
    in_name = re.search(r'class[ _]?(\d{1,4})$', name.strip(), re.IGNORECASE)
    found = number if isinstance(number, int) else int(in_name[1]) if in_name else 0
    if found < 1:
        raise CellSegError(
            f'layer {name}: does not say which class it is; expected a name that ends in class 1, '
            f'class 2, ...; rename the layer'
        )
    return found


def _label_map(name: str, labels: NDArray[Any]) -> NDArray[np.integer[Any]]:
    if labels.ndim != 2 or labels.dtype.kind not in 'bui':
        raise LabelMapError(
            f'layer {name}: holds {labels.dtype} of the shape {labels.shape}; expected whole '
            f'numbers in rows and columns; choose another layer'
        )
    if labels.min(initial=0) < 0 or labels.max(initial=0) > MAX_ID:
        raise LabelMapError(
            f'layer {name}: has labels from {labels.min()} to {labels.max()}; expected 0 to '
            f'{MAX_ID}; number the cells anew'
        )
    return labels


def _picture(name: str, pixels: NDArray[Any]) -> NDArray[np.uint8] | NDArray[np.uint16]:
    is_grey, is_rgb = pixels.ndim == 2, pixels.ndim == 3 and pixels.shape[2] in (3, 4)
    if not (is_grey or is_rgb) or pixels.dtype not in (np.uint8, np.uint16):
        raise ImageError(
            f'layer {name}: holds {pixels.dtype} of the shape {pixels.shape}; expected grey or RGB '
            f'of 8 or 16 bits; convert it'
        )
    return np.repeat(pixels[..., None], 3, axis=2) if is_grey else pixels[..., :3]


def _check(
    folder: Path,
    image: NDArray[Any] | None,
    label_maps: dict[int, NDArray[np.integer[Any]]],
) -> None:
    """Require an image, and one size."""
    if image is None and not (folder / 'image.tif').is_file():
        raise CellSegError(
            f'{folder}: has no image.tif, and no image is to be saved; expected both; select the '
            f'layer of the image too, or save into the folder of a case'
        )
    sizes = {label_map.shape for label_map in label_maps.values()}
    if image is not None:
        sizes.add(image.shape[:2])
    else:
        from cellseg_mm.data.image_reader import open_image

        with open_image(folder / 'image.tif') as reader:
            sizes.add(reader.image_hw)
    if len(sizes) > 1:
        raise CellSegError(
            f'{folder}: the layers have the sizes {sorted(sizes)}; they must match that of the '
            f'image; leave out the wrong one'
        )
