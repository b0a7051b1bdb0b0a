"""The parts of a training run that are not the loop: settings, ranks, run folder, screen."""
