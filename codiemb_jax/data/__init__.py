"""Files -> planned, placed batches."""
