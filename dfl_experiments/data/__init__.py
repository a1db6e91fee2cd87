"""Data sets: sources, packed arrays, augmentation and batches."""
