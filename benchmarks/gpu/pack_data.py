"""Packs real images for a machine that takes 64 MiB a call, and unpacks them there.

    python benchmarks/gpu/pack_data.py pack [--max-mib 40] [--checkpoint best.pth]  # 3 packs
    python benchmarks/gpu/pack_data.py unpack /tmp/cellseg_gpu/data .gpu_pack*     # there

Images become lossless WebP, which Pillow reads everywhere, each decoded again and compared; label
maps are small and go as they are. A checkpoint goes along as its weights alone, in fp16. Unpacking
writes the folders of docs/formats.md with uncompressed TIFF, so pixels, names and sizes are the
same and file hashes are not. The packs are ignored by git and never committed.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from cellseg_mm.data.labels import read_image

ROOT = Path(__file__).resolve().parents[2]
METHOD = 4  # of WebP: higher gains 1 % and takes three times as long


def entries(shared: Path, checkpoint: Path | None) -> Iterator[tuple[str, bytes]]:
    """Yield (name inside the data folder, bytes), training images first."""
    train, test = shared / 'hw3_train155', shared / 'hw3_test93'
    if checkpoint is not None:
        yield 'trained.pth', weights_alone(checkpoint)
    yield 'manifest.csv', (train / 'manifest.csv').read_bytes()
    for folder in sorted((train / 'train').iterdir()):
        yield f'train/{folder.name}/image.webp', encoded(folder / 'image.tif')
        for path in sorted(folder.glob('class*.tif')):
            yield f'train/{folder.name}/{path.name}', path.read_bytes()
    name = 'test_image_name_to_ids.json'
    yield name, (test / name).read_bytes()
    for path in sorted((test / 'test_release').iterdir()):
        yield f'test_release/{path.stem}.webp', encoded(path)


def encoded(path: Path) -> bytes:
    """Return an image as lossless WebP, after checking that it comes back the same."""
    pixels, buffer = read_image(path), io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'WEBP', lossless=True, quality=75, method=METHOD)
    if not np.array_equal(np.asarray(Image.open(buffer)), pixels):
        raise SystemExit(f'{path}: WebP changed a pixel')
    return buffer.getvalue()


def weights_alone(checkpoint: Path) -> bytes:
    """Return a checkpoint's weights and what it says of itself, floats as fp16."""
    import torch

    from cellseg_mm.weights.checkpoints import load_checkpoint_file

    content, buffer = load_checkpoint_file(checkpoint), io.BytesIO()
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in content['state_dict'].items()
    }
    torch.save({'state_dict': state, 'meta': content['meta']}, buffer)
    return buffer.getvalue()


def pack(shared: Path, out: Path, max_mib: float, checkpoint: Path | None = None) -> None:
    """Write ``.gpu_pack<k>/data.zip``, each of at most ``max_mib``; print their sizes."""
    limit, size, number = max_mib * 2**20, 0, 0
    archive: zipfile.ZipFile | None = None
    for name, data in entries(shared, checkpoint):
        if archive is None or size + len(data) > limit:
            if archive is not None:
                archive.close()
            number, size = number + 1, 0
            folder = out / f'.gpu_pack{number}'
            folder.mkdir(parents=True, exist_ok=True)
            archive = zipfile.ZipFile(folder / 'data.zip', 'w', zipfile.ZIP_STORED)
        archive.writestr(name, data)
        size += len(data) + 300  # the archive's own bytes per entry
    if archive is not None:
        archive.close()
    for path in sorted(out.glob('.gpu_pack*/data.zip')):
        print(f'{path}: {path.stat().st_size / 2**20:.1f} MiB')


def unpack(data_root: Path, packs: list[Path]) -> None:
    """Write the packs' files below ``data_root``; what is there already is written again."""
    for folder in packs:
        with zipfile.ZipFile(folder / 'data.zip') as archive:
            for name in archive.namelist():
                path = data_root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                data = archive.read(name)
                if path.suffix != '.webp':
                    path.write_bytes(data)
                    continue
                buffer, pixels = io.BytesIO(), np.asarray(Image.open(io.BytesIO(data)))
                tifffile.imwrite(buffer, pixels, photometric='rgb')
                path.with_suffix('.tif').write_bytes(buffer.getvalue())
    n_train = len(list(data_root.glob('train/*/image.tif')))
    n_test = len(list(data_root.glob('test_release/*.tif')))
    print(f'{data_root}: {n_train} training and {n_test} test images')


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    packing = commands.add_parser('pack')
    packing.add_argument('--shared', type=Path, default=ROOT.parent / 'shared' / 'data')
    packing.add_argument('--out', type=Path, default=ROOT)
    packing.add_argument('--max-mib', type=float, default=40)
    packing.add_argument('--checkpoint', type=Path, help='trained weights to take along')
    unpacking = commands.add_parser('unpack')
    unpacking.add_argument('data_root', type=Path)
    unpacking.add_argument('packs', type=Path, nargs='*')
    args = parser.parse_args()
    if args.command == 'pack':
        pack(args.shared, args.out, args.max_mib, args.checkpoint)
    else:
        unpack(args.data_root, args.packs)


if __name__ == '__main__':
    main()
