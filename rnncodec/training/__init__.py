"""How codecs and context models learn: Lightning modules, optimizers, and what W&B is told."""
