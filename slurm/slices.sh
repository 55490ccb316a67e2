# Sourced by the jobs that share out cases over an array: sets `slice` to the argument that names this task's part, and
# to nothing outside of an array. Of how many parts, the array itself tells where its numbers follow one another; one that
# runs some of an earlier array's tasks again says so: PARTS, of which task K is the K-th from 0.
part=()

refuse() {
    echo "error: --array: $1" >&2
    exit 2
}

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [ -n "${PARTS:-}" ]; then
    [[ "$PARTS" =~ ^[1-9][0-9]*$ ]] || refuse "PARTS=$PARTS is no number of slices: give that of the first array's tasks"
    if [ "$SLURM_ARRAY_TASK_MAX" -ge "$PARTS" ]; then
        refuse "task $SLURM_ARRAY_TASK_MAX is none of PARTS=$PARTS, which are 0 to $((PARTS - 1)): give the first array's size"
    fi
    part=("part=$SLURM_ARRAY_TASK_ID/$PARTS")
elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    span=$((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1))
    # A single task beyond the first is one of another array, which had more.
    if [ "$span" -ne "$SLURM_ARRAY_TASK_COUNT" ] || { [ "$span" -eq 1 ] && [ "$SLURM_ARRAY_TASK_MIN" -gt 0 ]; }; then
        refuse "its $SLURM_ARRAY_TASK_COUNT tasks do not say of how many slices they are: put PARTS=N before sbatch, N being the first array's size"
    fi
    part=("part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT")
fi
