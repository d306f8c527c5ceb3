"""From rows of files to prompts: rows, chat template, pictures, position, packing; preprocess/ prepares text data sets."""
