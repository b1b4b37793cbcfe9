r"""Trains a codec or a context model, as `rnncodec train` does. This docstring is the manual for launching it.

On a laptop or one GPU; Ctrl-C ends a run after its step, and --ckpt_path resumes it:

    rnncodec train fit --config small --data.root PHOTOS
    rnncodec train fit --config small --data.root PHOTOS --ckpt_path last

From given weights instead of random ones, as in the second part of the training of `small`:

    rnncodec train fit --config small_64 --data.root PHOTOS --model.weights first.safetensors

On one machine with 8 GPUs, and as a SLURM job that returns to the queue when it is preempted, on 4 nodes
(docs/cluster.md):

    python train.py fit --config configs/toderici2017_lstm_additive.yaml --data.root CLIC --data.download true \
        --trainer.devices 8 --trainer.strategy ddp
    sbatch --nodes 4 configs/cluster/train.sbatch --config configs/toderici2017_lstm_additive.yaml --data.root CLIC

The options of a config's model, with its values:

    rnncodec train fit --config latent --help

Context models for entropy coding are trained on the bits of a frozen codec (the name of shipped weights, or a file),
and one of them is then added to its file. Or codec and context model are trained together:

    rnncodec train fit --config context --data.root PHOTOS --model.codec codec.safetensors
    rnncodec export runs/context/best.ckpt codec.safetensors --context parallel
    rnncodec train fit --config small_gpu --data.root PHOTOS --model.weights small  # on a GPU

A config contains only what differs from DEFAULTS in rnncodec/training/cli.py; the command line overrides both. The
default precision is bf16-mixed if there is a GPU or the processor has AVX512-BF16, else 32-true; --trainer.precision
sets another. Checkpoints, metrics and the complete config.yaml are written to runs/NAME, where NAME is set by --name or
the config. W&B (docs/wandb.md) runs offline unless you are logged in or set WANDB_MODE. `rnncodec export` makes weights
for `rnncodec encode --weights` from a checkpoint.
"""

import sys

from rnncodec.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
