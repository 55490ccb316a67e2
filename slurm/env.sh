# Your cluster's own lines: modules, environment, caches. Every job sources this file. It is the only one to edit.
# module load python/3.11 cuda/12.4
# export WANDB_MODE=offline
# The network interface between nodes, if NCCL or gloo does not find it (gloo fails on hosts whose name resolves to 127.0.1.1):
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
