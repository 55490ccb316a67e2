# Sourced by the array jobs that share out cases. Sets `part` to this task's argument `part=K/N`; outside an array to nothing.
#
# N is the size of the array, as long as its task numbers are consecutive. To run only some tasks of an earlier array again,
# set PARTS to the size of that array: task K is then part K of PARTS, counted from 0.
part=()

refuse() {
    echo "error: --array: $1" >&2
    exit 2
}

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [ -n "${PARTS:-}" ]; then
    [[ "$PARTS" =~ ^[1-9][0-9]*$ ]] || refuse "PARTS=$PARTS is not a number of parts: give the size of the first array"
    if [ "$SLURM_ARRAY_TASK_MAX" -ge "$PARTS" ]; then
        refuse "task $SLURM_ARRAY_TASK_MAX is outside PARTS=$PARTS (0 to $((PARTS - 1))): give the size of the first array"
    fi
    part=("part=$SLURM_ARRAY_TASK_ID/$PARTS")
elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    span=$((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1))
    # A single task with a number above 0 belongs to an earlier, larger array.
    if [ "$span" -ne "$SLURM_ARRAY_TASK_COUNT" ] || { [ "$span" -eq 1 ] && [ "$SLURM_ARRAY_TASK_MIN" -gt 0 ]; }; then
        refuse "its $SLURM_ARRAY_TASK_COUNT tasks do not show the number of parts: put PARTS=N before sbatch, with the size of the first array"
    fi
    part=("part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT")
fi
