# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""`python -m mambaformer.dental_qa.build [--out DIR]`: builds DentalQA from the concept files. Deterministic."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .card import card
from .dataset import DATA, build_rows, write_parquet
from .loading import CONCEPTS, load_concepts
from .splitting import choose_held_out, read_held_out, write_held_out


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 when a concept was unusable and `--strict` was given."""
    parser = argparse.ArgumentParser(prog="python -m mambaformer.dental_qa.build", description=__doc__)
    parser.add_argument("--concepts", type=Path, default=CONCEPTS, help="folder of the concept files")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write Parquet files and the card to")
    parser.add_argument("--freeze", action="store_true", help="fill up the frozen choice of held-out concepts")
    parser.add_argument("--strict", action="store_true", help="stop when a concept file has a problem")
    args = parser.parse_args(argv)

    concepts, problems = load_concepts(args.concepts)
    for problem in problems:
        print(f"warning {problem}", file=sys.stderr)
    if problems and args.strict:
        return 1
    if args.freeze:
        write_held_out(choose_held_out(concepts, read_held_out() or []))
    held_out = read_held_out() if args.concepts == CONCEPTS else None
    rows, removed = build_rows(concepts, held_out or choose_held_out(concepts))
    write_parquet(rows, args.out)
    text = card(concepts, rows)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(text[text.index("## Statistics") : text.index("## Made how")])
    for reason, count in sorted(removed.items()):
        print(f"removed {count:5d}  {reason}")
    size = sum(path.stat().st_size for path in args.out.glob("*.parquet"))
    print(f"wrote {len(rows)} rows, {size / 1e6:.2f} MB of Parquet, to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
