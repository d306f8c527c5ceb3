"""Preference pairs of the pictures in pictures.py: the right answer, and that of another picture. Only the picture tells which is which.

Every two answers stand as often the one way round as the other, so that without its pictures a model is right for one half, whatever it
prefers. `test_blank` is `test` on white paper: the accuracy there says whether a model looks.

    python examples/rl/quickstart/picture_pairs.py --data quickstart/data/geo3k --out quickstart/pairs
    -> {train,test,test_blank}.parquet with columns prompt, images, chosen, rejected
"""

from __future__ import annotations

import argparse
import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pictures import ANSWERS, solution
from PIL import Image

STEPS = tuple(step for near in range(1, len(ANSWERS) // 2) for step in (near, len(ANSWERS) - near)) + (len(ANSWERS) // 2,)
"""How far behind the right answer the wrong one stands, round the circle: there and back again in turn."""


def wrong_answers(answers: list[int]) -> Iterator[int]:
    seen: Counter[int] = Counter()
    for answer in answers:
        step = STEPS[seen[answer] % len(STEPS)]
        seen[answer] += 1
        yield ANSWERS[(ANSWERS.index(answer) + step) % len(ANSWERS)]


def on_white_paper(image: dict[str, Any]) -> dict[str, Any]:
    """A blank picture of the same size."""
    png = io.BytesIO()
    Image.new("RGB", Image.open(io.BytesIO(image["bytes"])).size, "white").save(png, "PNG")
    return {"bytes": png.getvalue(), "path": None}


def pairs_of(rows: pa.Table, blank: bool) -> pa.Table:
    """rows: of geo3k.py."""
    answers = [int(extra["answer"]) for extra in rows["extra_info"].to_pylist()]
    images = rows["images"]
    if blank:
        images = pa.chunked_array([pa.array([[on_white_paper(image) for image in of_row] for of_row in images.to_pylist()], images.type)])
    return pa.table(
        {
            "prompt": rows["prompt"],
            "images": images,
            "chosen": [solution(answer) for answer in answers],
            "rejected": [solution(answer) for answer in wrong_answers(answers)],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet of geo3k.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, blank in (("train", False), ("test", False), ("test_blank", True)):
        table = pairs_of(pq.read_table(args.data / f"{name.removesuffix('_blank')}.parquet"), blank)
        unfinished = args.out / f"{name}.partial"
        pq.write_table(table, unfinished)
        os.replace(unfinished, args.out / f"{name}.parquet")
        print(f"{args.out / name}.parquet: {len(table)} pairs")


if __name__ == "__main__":
    main()
