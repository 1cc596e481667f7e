#!/bin/bash
# Four nodes of eight GPUs: sbatch examples/clusters/slurm.sh. The output folder must be on a shared file system.
#SBATCH --job-name=titans
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Two minutes before the end torchrun gets SIGINT, as from Ctrl-C: the step ends and a checkpoint is written.
#SBATCH --signal=INT@120
#SBATCH --requeue

set -euo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=()
if compgen -G "runs/1.3b/checkpoint-*" > /dev/null; then resume=(--resume); fi

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:29500" \
  -m titans train --config-file examples/recipes/1.3b.yml "${resume[@]}"
