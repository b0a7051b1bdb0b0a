"""What training will hold in memory, from shapes and settings alone."""

from toolkit.memory.model import Buckets, peak, per_parameter, resident

__all__ = ["Buckets", "peak", "per_parameter", "resident"]
