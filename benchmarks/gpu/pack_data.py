"""Packs real images for a machine that takes 64 MiB a call, and what comes back from it.

    python benchmarks/gpu/pack_data.py pack                          # here: .gpu_pack1, .gpu_pack2
    python benchmarks/gpu/pack_data.py unpack DATA_ROOT .gpu_pack*   # there
    python benchmarks/gpu/pack_data.py weights OUT iter_*.pth        # there: fp16, 8 MiB each

Images become lossless WebP, which Pillow reads everywhere, each decoded again and compared; label
maps are small and go as they are. Unpacking writes the folders of docs/formats.md with uncompressed
TIFF, so pixels, names and sizes are the same and file hashes are not. The packs are ignored by git
and never committed.
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


def entries(train: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name inside the data folder, bytes)."""
    yield 'manifest.csv', (train / 'manifest.csv').read_bytes()
    for folder in sorted((train / 'train').iterdir()):
        yield f'train/{folder.name}/image.webp', encoded(folder / 'image.tif')
        for path in sorted(folder.glob('class*.tif')):
            yield f'train/{folder.name}/{path.name}', path.read_bytes()


def encoded(path: Path) -> bytes:
    """Return an image as lossless WebP, after checking that it comes back the same."""
    pixels, buffer = read_image(path), io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'WEBP', lossless=True, quality=75, method=METHOD)
    if not np.array_equal(np.asarray(Image.open(buffer)), pixels):
        raise SystemExit(f'{path}: WebP changed a pixel')
    return buffer.getvalue()


def save_weights(out: Path, checkpoints: list[Path]) -> None:
    """Write each checkpoint's weights and what it says of itself, floats as fp16, by its fold."""
    import torch

    from cellseg_mm.weights.checkpoints import load_checkpoint_file

    for path in checkpoints:
        content = load_checkpoint_file(path)
        state = {
            name: value.half() if value.is_floating_point() else value
            for name, value in content['state_dict'].items()
        }
        torch.save({'state_dict': state, 'meta': content['meta']}, out / f'{path.parent.name}.pth')


def pack(train: Path, out: Path, max_mib: float) -> None:
    """Write ``.gpu_pack<k>/data.zip``, each of at most ``max_mib``; print their sizes."""
    packs: list[dict[str, bytes]] = [{}]
    for name, data in entries(train):
        if sum(map(len, packs[-1].values())) + len(data) > max_mib * 2**20:
            packs.append({})
        packs[-1][name] = data
    for number, files in enumerate(packs, 1):
        path = out / f'.gpu_pack{number}' / 'data.zip'
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
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
                pixels = np.asarray(Image.open(io.BytesIO(data)))
                tifffile.imwrite(path.with_suffix('.tif'), pixels, photometric='rgb')
    n_train = len(list(data_root.glob('train/*/image.tif')))
    print(f'{data_root}: {n_train} training images')


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    packing = commands.add_parser('pack')
    packing.add_argument('--train', type=Path, default=ROOT.parent / 'shared/data/hw3_train155')
    packing.add_argument('--out', type=Path, default=ROOT)
    packing.add_argument('--max-mib', type=float, default=21)
    unpacking = commands.add_parser('unpack')
    unpacking.add_argument('data_root', type=Path)
    unpacking.add_argument('packs', type=Path, nargs='*')
    weights = commands.add_parser('weights')
    weights.add_argument('out', type=Path)
    weights.add_argument('checkpoints', type=Path, nargs='+')
    args = parser.parse_args()
    if args.command == 'pack':
        pack(args.train, args.out, args.max_mib)
    elif args.command == 'unpack':
        unpack(args.data_root, args.packs)
    else:
        save_weights(args.out, args.checkpoints)


if __name__ == '__main__':
    main()
