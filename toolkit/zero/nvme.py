"""`offload_optimizer` to NVMe for this package's optimizers.

DeepSpeed swaps states of the size and type of fp32 weights there, and needs libaio. Here it is told to offload to the
host, and state that is made on the host lies in files (`toolkit.state.files`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

from toolkit.agreed import agreed
from toolkit.errors import UserError
from toolkit.state.files import StateFiles


def take_over(engine: Any) -> StateFiles | None:
    """Offload to the host instead of to NVMe, before the optimizer of `engine` is made; every rank must call this.

    Returns:
        What the optimizer's state is to be made with; None where the JSON says nothing of NVMe.

    Raises:
        UserError: it names no folder, or one that takes no files.
    """
    section = engine._config.zero_config.offload_optimizer
    if section is None or section.device != OffloadDeviceEnum.nvme:
        return None
    if section.nvme_path is None:  # a plain deepspeed.initialize checks nothing
        raise UserError("zero_optimization.offload_optimizer.device 'nvme' needs nvme_path beside it.")
    engine._config.zero_config.offload_optimizer = section.model_copy(update={"device": OffloadDeviceEnum.cpu})
    return agreed(lambda: StateFiles(Path(section.nvme_path)))
