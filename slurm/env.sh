# Sourced by the sbatch files, on every job's first node. The cluster's own lines go here; nothing else needs editing.
#
# module purge
# module load python/3.11 cuda/12.6
#
# The virtual environment that segvol-pl is installed in, on a file system that all nodes see:
# source .venv/bin/activate
#
# Nodes without network: CLIP from a local folder (text.clip=FOLDER), wandb written to disk and sent later.
# export HF_HUB_OFFLINE=1
# export WANDB_MODE=offline
#
# Where NCCL picks the wrong network:
# export NCCL_SOCKET_IFNAME=ib0
