"""Training of codecs and context models: Lightning modules, optimizers, command line, export, and logging to W&B."""
