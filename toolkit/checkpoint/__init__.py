"""Checkpoints: their files, their manifest, and any part of their content for any number of ranks.

    sharding.py    where each element of each parameter lies, at any stage and number of ranks
    manifest.py    what stands beside the files; hashes
    schema.py, content.py, opening.py    what manifests and files may say, and reading them without running any code
    store.py       the folder of a run's checkpoints: put in place by one rename
    source.py      the files of a checkpoint as one model
    transfer.py    a rank's tensors from a checkpoint that was cut or kept otherwise
    convert.py, universal.py, export.py, commands.py    other layouts, and the command line

Nothing here needs DeepSpeed or a process group; `toolkit.zero.checkpoint` is the side of the engine.
"""
