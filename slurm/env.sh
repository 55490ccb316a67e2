# Your cluster's own lines: modules, environment, caches. Every job sources this file. It is the only one to edit.
# module load python/3.11 cuda/12.4
# export WANDB_MODE=offline

# -- Networks: if ranks wait for each other at the start, or gloo says `Connection refused` or `Connection timed out` --
# Every rank connects to rank 0's host (MASTER_ADDR, by default the first node of the job; MASTER_PORT, by default 15000
# plus the last four digits of the job's number). Then ranks connect to each other directly, by NCCL and by gloo.
#
# gloo offers other ranks the address that its own host's name resolves to. If /etc/hosts has the name at 127.0.1.1 (as
# on Debian and Ubuntu), that address works on no other node. This shows what each node would offer:
#   srun --ntasks-per-node=1 sh -c 'echo "$(hostname): $(getent hosts "$(hostname)")"'
# Name the interface that connects the nodes (`ip -brief address` on a node lists them). gloo wants the exact name. NCCL
# also takes the start of a name (ib means ib0 and ib1), an exact one with = (=ib0), and excluded ones with ^ (^docker0):
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
# NCCL's data goes over InfiniBand if it finds an adapter; these variables are about its sockets. `NCCL_DEBUG=INFO`
# prints what it has chosen (`NET/IB` or `NET/Socket`), and NCCL_IB_HCA names adapters.
#
# If nodes know each other only with a domain, or by the name of another interface, name rank 0's host yourself:
# export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1).cluster.example"
# If two jobs share a node, and their numbers end with the same four digits, give one of them another port:
# export MASTER_PORT=29517

# -- Open files: gloo connects every rank with every other one, 1,023 connections of each of 1,024 ranks --
# A run raises its own limit as far as it may, and names what it needs if that is not enough. SLURM gives a job the
# limits of the shell that called sbatch; `sbatch --propagate=NONE` gives it those of the node (LimitNOFILE of slurmd).
# ulimit -n "$(ulimit -Hn)"
# With this, gloo connects two ranks only when they first send to each other. Off by default: up to torch 2.13 a rank
# that dies before that lets the other one wait beyond its timeout (fixed in gloo in August 2026).
# export TORCH_GLOO_LAZY_INIT=1

# -- torch's own watching of NCCL --
# Leave TORCH_NCCL_ASYNC_ERROR_HANDLING as it is (1: a failed exchange ends the rank). TORCH_NCCL_BLOCKING_WAIT=1 makes
# the host wait for every exchange: for finding faults only. NCCL's timeout is twice run.hang_timeout, so that the run
# names the rank that hangs before torch ends it. If compiling kernels stops a process for minutes, torch's heartbeat
# may take it for hung (`heartbeat` in the log): give it more seconds.
# export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=1800

if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
