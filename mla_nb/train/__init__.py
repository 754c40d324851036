"""Training: the learner, loaders, devices and processes, checkpoints, live views."""
