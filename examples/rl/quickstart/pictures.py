"""Draws right triangles with one acute angle written in: find the other one, x. Parquet in the schema of hiyouga/geometry3k.

The question is always "<image>Find x.", so the number is in the picture and nowhere in the text; the angles are not drawn to scale, so only
the label tells the answer. Sixteen answers (10, 15, ... 85), equally many of each: chance is 1 in 16. No picture is drawn twice.

    python examples/rl/quickstart/pictures.py --out quickstart/pictures
    -> {warm_start,rl}/{train,test}.parquet with columns images, problem, answer
"""

from __future__ import annotations

import argparse
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

SIZE = 84
"""Pixels a side: 6 x 6 patches of 14, which the merger turns into 9 image tokens."""
ANSWERS = tuple(range(10, 90, 5))
PROBLEM = "<image>Find x."
LABEL_JITTER = 1.5
"""Pixels that the label moves about. A looser layout needs far more pictures before anything but memorising them pays."""
SPLITS = {"warm_start/train": 2048, "warm_start/test": 160, "rl/train": 3072, "rl/test": 304}
FONT = ImageFont.load_default(size=16)


def solution(answer: int) -> str:
    """The response that the warm start teaches. Example: solution(55) == "<think> 90 - 35 = 55 </think> \\boxed{55}"."""
    return f"<think> 90 - {90 - answer} = {answer} </think> \\boxed{{{answer}}}"


def draw(rng: random.Random, answer: int) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), "white")
    canvas = ImageDraw.Draw(image)
    width, height = SIZE * rng.uniform(0.80, 0.92), SIZE * rng.uniform(0.70, 0.84)
    left, top = (SIZE - width) / 2, (SIZE - height) / 2
    flip_x, flip_y = rng.random() < 0.5, rng.random() < 0.5

    def place(x: float, y: float) -> tuple[float, float]:
        return (SIZE - x if flip_x else x), (SIZE - y if flip_y else y)

    canvas.polygon([place(left, top + height), place(left + width, top + height), place(left, top)], outline="black")
    corner = 0.09 * SIZE
    square = [place(left + corner, top + height), place(left + corner, top + height - corner), place(left, top + height - corner)]
    canvas.line(square, fill="black")
    x, y = place(42 + rng.uniform(-LABEL_JITTER, LABEL_JITTER), 62 + rng.uniform(-LABEL_JITTER, LABEL_JITTER))
    label = str(90 - answer)
    canvas.text((x, y), label, fill="black", font=FONT, anchor="mm")
    degree = x + canvas.textlength(label, FONT) / 2 + 1
    canvas.ellipse([degree, y - 6, degree + 3, y - 3], outline="black")
    canvas.text(place(left + 0.1 * width, top + 0.28 * height), "x", fill="black", font=FONT, anchor="mm")
    return image


def balanced_answers(rng: random.Random, count: int) -> list[int]:
    answers = [ANSWERS[i % len(ANSWERS)] for i in range(count)]
    rng.shuffle(answers)
    return answers


def new_pictures(rng: random.Random, answers: list[int], seen: set[bytes]) -> Iterator[bytes]:
    """PNG files, one per answer, none of which is in `seen`; what was drawn is added to it."""
    for answer in answers:
        image = draw(rng, answer)
        while image.tobytes() in seen:
            image = draw(rng, answer)
        seen.add(image.tobytes())
        png = io.BytesIO()
        image.save(png, "PNG")
        yield png.getvalue()


def write_split(path: Path, answers: list[int], pictures: Iterator[bytes]) -> None:
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [[{"bytes": png, "path": None}] for png in tqdm(pictures, total=len(answers), desc=str(path), unit="picture")]
    table = pa.table(
        {
            "images": pa.array(images, pa.list_(image_type)),
            "problem": pa.array([PROBLEM] * len(answers)),
            "answer": pa.array([str(answer) for answer in answers]),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    pq.write_table(table, unfinished)
    os.replace(unfinished, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seen: set[bytes] = set()
    for index, (name, count) in enumerate(SPLITS.items()):
        rng = random.Random(f"{args.seed}/{index}")
        answers = balanced_answers(rng, count)
        write_split(args.out / f"{name}.parquet", answers, new_pictures(rng, answers, seen))


if __name__ == "__main__":
    main()
