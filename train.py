r"""Trains a codec or a context model. This docstring is the launch manual.

On a laptop or one GPU; a run that was stopped goes on where it was with --ckpt_path:

    python train.py fit --config configs/small.yaml --data.root PHOTOS
    python train.py fit --config configs/small.yaml --data.root PHOTOS --ckpt_path runs/small/last.ckpt

From given weights instead of random ones, as the second part of the training of `small`:

    python train.py fit --config configs/small_64.yaml --data.root PHOTOS --model.weights first.safetensors

On one machine with 8 GPUs, and in a SLURM job (4 nodes, one task per GPU):

    python train.py fit --config configs/toderici2017_lstm_additive.yaml --data.root CLIC --data.download true \
        --trainer.devices 8 --trainer.strategy ddp
    srun python train.py fit --config configs/toderici2017_lstm_additive.yaml --data.root CLIC \
        --trainer.num_nodes 4 --trainer.devices 8 --trainer.strategy ddp

The context models of the entropy coder learn from the bits of a codec that stays as it is, a name of shipped weights or
a file; one of them becomes part of that file. Or codec and context model are trained together:

    python train.py fit --config configs/context.yaml --data.root PHOTOS --model.codec codec.safetensors
    rnncodec export runs/context/best.ckpt codec.safetensors --context parallel
    python train.py fit --config configs/small_gpu.yaml --data.root PHOTOS --model.weights small  # on a GPU

A config says only what differs from DEFAULTS below; the command line overrides both. Precision is bf16-mixed where
there is a GPU or the processor has AVX-512, else 32-true, unless --trainer.precision says otherwise. Checkpoints,
metrics and the complete config.yaml go to runs/NAME (--name, else the config's). W&B (docs/wandb.md) runs offline
unless you are logged in or set WANDB_MODE. The weights that `rnncodec --weights` takes are made from a checkpoint by
`rnncodec export`.
"""

import sys

from rnncodec.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
