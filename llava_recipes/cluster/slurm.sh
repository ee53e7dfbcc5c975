#!/bin/bash
# Two machines of eight GPUs under SLURM; one with  sbatch --nodes 1 slurm.sh ...
#
#   sbatch slurm.sh --model llava-1.5-13b --bf16 --gradient_checkpointing --deepspeed zero3 \
#       --data_path train.json --image_folder images --output_dir runs/a
#
# Five minutes before the time is over SLURM sends SIGTERM; the run saves after the step at hand, within the 30 seconds
# that torchrun gives it, and stops. Submitted again, with the same words, it resumes. The output folder must be one
# that all machines see. A machine that loses its network is noticed after --ddp_timeout seconds (1800 by default);
# srun then ends the other processes.
#SBATCH --job-name=milora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
first=${FIRST_MACHINE:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}

srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${PROCESSES:-8}" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:${PORT:-29500}" \
    -m milora_vl.train "$@" --resume_from_checkpoint auto
