# For the Slurm scripts: `run COMMAND` runs a command as a step of the job, and exits with its status. Slurm sends
# SIGTERM two minutes before the time is up, and at a preemption. The command then saves its state, and the job goes
# back into the queue, 20 times at most.
run() {
    srun --cpus-per-task="$SLURM_CPUS_PER_TASK" "$@"
    local status=$?
    if [ $status -eq 143 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then  # 143: stopped by SIGTERM
        scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    fi
    exit $status
}
