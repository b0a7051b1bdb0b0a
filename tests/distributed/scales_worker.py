"""One rank of a few runs by the command line's arguments, and of rules on gradients that are known beforehand.

Started by the `deepspeed` launcher with the path of a JSON of settings as only argument; `steps` as in
`checkpoint_worker.py`, or {"case": a case of `plugins_worker.py`}.
"""

from __future__ import annotations

import checkpoint_worker
from plugins_worker import train
from ranks import answer

from toolkit.run import ranks

if __name__ == "__main__":
    ranks.prepare_environment()
    answer(checkpoint_worker.KINDS | {"case": train})
    ranks.finish()
