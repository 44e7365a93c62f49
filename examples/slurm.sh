#!/bin/bash
# A training under SLURM that goes on after its time limit, after a preemption and after a failed node:
#     sbatch examples/slurm.sh
# SLURM sends USR1 two minutes before the end. What is left then is enough for a last checkpoint, and the job queues
# up again. (Without --signal the command knows the end of the job too, and stops in time by itself.)
#SBATCH --job-name=gpt
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

ckptctl run --nproc "${NPROC:-2}" --grace 90s --store "${STORE:-./runs}" -- "${@:-examples/gpt.py}" &
run=$!
trap 'kill -USR1 "$run" 2>/dev/null' USR1
trap 'kill -TERM "$run" 2>/dev/null' TERM

wait "$run"
while kill -0 "$run" 2>/dev/null; do # a signal ends the wait, but not the command
    wait "$run"
done
wait "$run" # which has ended, maybe just after a signal: now it is its own code
code=$?
if [ "$code" -eq 75 ]; then # stopped on purpose, and resumable
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
