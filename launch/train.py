"""The script for the `deepspeed` launcher: `deepspeed [--num_gpus N] launch/train.py --help`."""

from __future__ import annotations

import sys

from toolkit.train import main

if __name__ == "__main__":
    sys.exit(main())
