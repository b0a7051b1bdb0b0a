"""What training holds in memory: before a run, during it and after it."""
