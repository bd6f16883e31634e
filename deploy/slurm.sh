#!/bin/bash
# A plan on the GPUs of one or several nodes under SLURM, from the checkout's root; goes on after a time limit or preemption:
#   sbatch deploy/slurm.sh configs/wn18rr/dualde_complex.yaml --out /shared/runs/first
# Two minutes before the limit SLURM sends SIGTERM: the ranks save a checkpoint, and the job is put into the queue again.
#SBATCH --job-name=distkgd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

out=""
for argument in "$@"; do
    [[ "${previous:-}" == --out ]] && out="$argument"
    previous="$argument"
done
[[ -n "$out" ]] || { echo "give --out FOLDER, on a disk that all nodes see" >&2; exit 2; }

ranks="${SLURM_GPUS_ON_NODE:-${SLURM_CPUS_PER_TASK:-1}}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=()
[[ -f "$out/plan.yaml" ]] && resume=(--resume)

srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks" --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d --rdzv-endpoint "$head:${RDZV_PORT:-29500}" launch/distill.py "$@" "${resume[@]}" &
ranks_pid=$!
stopped=""
trap 'stopped=yes; kill -TERM "$ranks_pid"' TERM
wait "$ranks_pid"
code=$?
if [[ -n "$stopped" ]]; then
    wait "$ranks_pid" # the first wait ends with the signal, this one when the checkpoint is written
    code=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
