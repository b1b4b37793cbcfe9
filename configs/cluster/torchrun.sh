#!/bin/bash
# Trains on several machines without SLURM: run it on each of them, with their number, their GPUs and the name of one:
#
#     NODES=2 GPUS=8 FIRST=node1 configs/cluster/torchrun.sh --config base --data.root PHOTOS --name first
#
# Ctrl-C or SIGTERM on one of them saves runs/NAME/last.ckpt, and the same command goes on from there.

exec torchrun --nnodes "${NODES:=1}" --nproc-per-node "${GPUS:=1}" --rdzv-backend c10d \
    --rdzv-endpoint "${FIRST:=localhost}:${PORT:=29500}" --rdzv-id rnncodec --no-python \
    rnncodec train fit --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" --trainer.strategy ddp \
    --ckpt_path last "$@"
