"""From parquet rows to prompts: rows, chat template, pictures, position, packing."""
