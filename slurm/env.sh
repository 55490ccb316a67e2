# The cluster's own lines: modules, the environment, caches. Sourced by every job; nothing else is edited.
# module load python/3.11 cuda/12.4
# export WANDB_MODE=offline
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
