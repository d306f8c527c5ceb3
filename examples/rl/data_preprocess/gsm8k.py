"""GSM8K (schema of openai/gsm8k: question, answer) to the rows that training reads.

python examples/rl/data_preprocess/gsm8k.py --local_data train.jsonl --output ~/data/gsm8k/train.parquet
python examples/rl/data_preprocess/gsm8k.py --local_data main/train-00000-of-00001.parquet --output ~/data/gsm8k/train.parquet --shots 1

Each row asks for the answer in \\boxed{}, as the verifiers acc and math_17k_acc want it. A small model follows an example rather than an
instruction: --shots N shows the file's N shortest questions, with their solutions, as turns before the question; they are no rows then.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DATA_SOURCE = "openai/gsm8k"
INSTRUCTION = "Put the final answer in \\boxed{}."
_CALCULATION = re.compile(r"<<.*?>>")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one sentence and no file."""
    parser = argparse.ArgumentParser(description="Makes the training rows of GSM8K.")
    parser.add_argument("--local_data", type=Path, required=True, help=f"jsonl or parquet file of {DATA_SOURCE}")
    parser.add_argument("--output", type=Path, required=True, help="parquet file to write")
    parser.add_argument("--shots", type=int, default=0, help="solved questions shown before each question (0)")
    options = parser.parse_args(arguments)
    output = options.output.expanduser()
    try:
        rows = training_rows(read(options.local_data.expanduser()), options.shots)
        write(rows, output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{output}: {len(rows)} rows")
    return 0


def write(rows: list[dict[str, Any]], output: Path) -> None:
    """The file, whole or not at all. Raises ValueError that names it."""
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), unfinished)
        unfinished.replace(output)
    except OSError as error:
        raise ValueError(f"--output: {output} can't be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def read(file: Path) -> list[dict[str, Any]]:
    """Raises ValueError, naming the row, where the question or the #### line of the answer is missing."""
    if not file.is_file():
        raise ValueError(f"--local_data: {file} does not exist")
    if file.suffix == ".parquet":
        rows = pq.read_table(file).to_pylist()
    else:
        rows = [
            parsed(line, f"{file}, line {number}") for number, line in enumerate(file.read_text("utf-8").splitlines(), 1) if line.strip()
        ]
    for number, row in enumerate(rows):
        if not str(row.get("question") or "").strip() or "####" not in str(row.get("answer") or ""):
            raise ValueError(f"{file}, row {number}: a row needs a question, and an answer that ends in '#### <number>'")
    return rows


def parsed(line: str, where: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error


def training_rows(rows: list[dict[str, Any]], shots: int) -> list[dict[str, Any]]:
    if not 0 <= shots < len(rows):
        raise ValueError(f"--shots {shots} must be at least 0 and less than the {len(rows)} rows of the file")
    shortest = sorted(range(len(rows)), key=lambda number: len(rows[number]["question"]) + len(rows[number]["answer"]))[:shots]
    shown = [turn for number in shortest for turn in (asked(rows[number]), {"role": "assistant", "content": solution(rows[number])})]
    return [training_row(row, number, shown) for number, row in enumerate(rows) if number not in shortest]


def training_row(row: dict[str, Any], number: int, shown: list[dict[str, str]]) -> dict[str, Any]:
    answer = final_answer(row)
    return {
        "data_source": DATA_SOURCE,
        "prompt": [*shown, asked(row)],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": number, "answer": answer, "question": row["question"]},
    }


def asked(row: dict[str, Any]) -> dict[str, str]:
    return {"role": "user", "content": f"{row['question'].strip()} {INSTRUCTION}"}


def solution(row: dict[str, Any]) -> str:
    """The steps without the calculator's marks, then the boxed answer."""
    steps = _CALCULATION.sub("", row["answer"].rpartition("####")[0]).strip()
    return f"{steps}\n\\boxed{{{final_answer(row)}}}"


def final_answer(row: dict[str, Any]) -> str:
    """Example: "... #### 1,200" gives "1200"."""
    return row["answer"].rpartition("####")[2].strip().replace(",", "")


if __name__ == "__main__":
    sys.exit(main())
