"""merge_group_keys: prepared columns of several data sets joined into one, without decoding them."""

from __future__ import annotations

from pathlib import Path

from mindspeed_mm_rl.data.indexed import IndexedColumn
from mindspeed_mm_rl.data.preprocess.output import new_columns
from mindspeed_mm_rl.data.preprocess.settings import Settings


def merge(settings: Settings) -> list[str]:
    """Joins, for every key, the columns of the folder whose names hold it, in the order of their names; a line per joined column.

    Raises ValueError for a key without columns, for columns of different types, and for an output among the inputs.
    """
    folder = Path(settings.input).expanduser()
    if not folder.is_dir():
        raise ValueError(f"input: {settings.input} must be a folder of .bin and .idx files, as merge_group_keys is given")
    lines = []
    for key in settings.merge_group_keys or ():
        target = Path(f"{settings.output_prefix}_{key}").expanduser()
        names = sorted(path.with_suffix("") for path in folder.glob("*.idx") if key in path.name)
        if not names:
            raise ValueError(f"merge_group_keys: no .idx file in {folder} has {key} in its name")
        if target.resolve() in {name.resolve() for name in names}:
            raise ValueError(f"output_prefix: {target} is one of the columns to join; choose another prefix")
        columns = [IndexedColumn(name) for name in names]
        if len({column.type_code for column in columns}) > 1:
            raise ValueError(f"merge_group_keys: the columns with {key} in their names have different types of ids; join them apart")
        with new_columns([target], columns[0].type_code) as (writer,):
            for column in columns:
                writer.add_column(column)
        lines.append(f"{target}.bin, .idx: {sum(map(len, columns))} sequences of {', '.join(name.name for name in names)}")
    return lines
