"""Text data sets to columns of token ids: records -> samples -> chat template -> IndexedDataset files."""
