"""A trained model in use: opened from a run, a checkpoint or an export, sampled and evaluated."""
