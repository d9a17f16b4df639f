"""Draw a small H&E-like data set in the real collection's layout, to try everything without data.

Prints where it is. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cellseg_mm.cli import run_tool


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out_dir', type=Path, help='folder to make; must not exist or be empty')
    parser.add_argument('--n-train', type=int, default=48, help='training images')
    parser.add_argument('--n-test', type=int, default=8, help='test images')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--dense', action='store_true', help='hundreds of small touching cells')
    return parser.parse_args()


def main() -> None:
    """Draw, write, and say where."""
    args = parse_args()
    from cellseg_mm.data.drawing.sample import make_sample

    out_dir = make_sample(
        args.out_dir,
        n_train=args.n_train,
        n_test=args.n_test,
        seed=args.seed,
        dense=args.dense,
    )
    print(f'{args.n_train} training and {args.n_test} test images in {out_dir}')


if __name__ == '__main__':
    run_tool(main)
