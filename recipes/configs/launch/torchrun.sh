#!/usr/bin/env bash
# One machine, all of its GPUs:   recipes/configs/launch/torchrun.sh sft recipes/configs/wan/sft.yaml --data clips --out runs/wan-sft
# Started again after a kill it goes on: a run that is in --out resumes from its last checkpoint. PROCESSES overrides the number of processes (without a GPU: 1); where one dies, all
# begin again from the last checkpoint, RESTARTS times (0).
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 TOKENIZERS_PARALLELISM=false
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or ranks that begin anew may find the addresses of dead ones
processes="${PROCESSES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"

exec torchrun --standalone --nproc-per-node "$processes" --max-restarts "${RESTARTS:-0}" -m recipes.cli "$@" --resume
