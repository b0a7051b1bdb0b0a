"""`toolkit bench`: how fast this machine does what a training run does, measured beside others' code in one run."""
