#!/bin/bash
# LLaVA-1.5-13B with ZeRO-3 on two machines of eight GPUs under SLURM:   sbatch many_gpus.slurm.sh
#
# Five minutes before the time is over, SLURM sends SIGTERM; the run saves after the current step and stops. torchrun
# kills it 30 seconds later, so a long step or a large checkpoint is lost: --save_steps limits how much. Submitted again,
# it continues from the last complete checkpoint. The folders must be ones that all machines see.
#SBATCH --job-name=milora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail
export OMP_NUM_THREADS=4
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:29500" \
    -m milora_vl.train --model llava-1.5-13b --data_path train.json --image_folder images \
    --bf16 --gradient_checkpointing --deepspeed zero3 --output_dir runs/many --resume_from_checkpoint auto
