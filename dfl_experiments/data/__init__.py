"""Where images come from, how they are kept, augmented and cut into batches."""
