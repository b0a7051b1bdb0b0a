"""What `tests/gpu/measure.py` measures, part by part; nothing here imports torch before a part runs."""
