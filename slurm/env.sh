# The cluster's own lines: modules, the environment, caches. Sourced by every job; nothing else is edited.
# module load python/3.11 cuda/12.4
# export WANDB_MODE=offline
# The network interface between nodes, where NCCL or gloo does not find it by itself (gloo fails on hosts whose name is 127.0.1.1):
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
