#!/usr/bin/env bash
# Start a SLURM cluster of one node on the loopback interface, for the tests marked `slurm`; stop it again.
#
#     .ci/slurm.sh start [FOLDER]    installs Debian's slurm-wlm and munge where they are missing, prints SLURM_CONF=...
#     .ci/slurm.sh stop [FOLDER]
#
# It needs root, because SLURM runs jobs as their owners, and apt-get unless SLURM is installed. Exit code 3: this machine
# does not allow it, and a line says why. FOLDER (slurm-one-node in the folder of temporary files) keeps the state and the logs of the cluster.
set -euo pipefail
folder=${2:-${TMPDIR:-/tmp}/slurm-one-node}

cannot() { echo "no SLURM here: $*" >&2; exit 3; }

install() {
    command -v slurmctld slurmd sbatch munged >/dev/null && return
    command -v apt-get >/dev/null || cannot "apt-get and slurm-wlm are missing"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -q && apt-get install -y -q --no-install-recommends slurm-wlm munge; } >"$folder/apt.log" 2>&1 ||
        cannot "apt-get does not install slurm-wlm and munge, see $folder/apt.log"
}

configure() {
    local node memory
    node=$(hostname -s)
    memory=$(awk '/^MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    mkdir -p "$folder/state" "$folder/spool"
    # cred_expire: a requeued job waits until its old credential has expired, two minutes by default.
    # 127.0.0.1 throughout: the name of the machine need not resolve.
    cat >"$folder/slurm.conf" <<CONF
ClusterName=one-node
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=10
JobRequeue=1
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$node Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
    [ "$(id -u)" = 0 ] || cannot "this is not root"
    mkdir -p "$folder"
    install
    configure
    # A munge of its own: a key and a socket in FOLDER, so that a cluster this machine may belong to is left alone.
    [ -s "$folder/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" >>"$folder/munged.out" 2>&1 ||
        cannot "munged does not start, see $folder/munged.log"
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld -c >>"$folder/slurmctld.out" 2>&1 || cannot "slurmctld does not start, see $folder/slurmctld.log"
    slurmd -N "$(hostname -s)" >>"$folder/slurmd.out" 2>&1 || cannot "slurmd does not start, see $folder/slurmd.log"
    for _ in $(seq 60); do
        if sinfo --noheader --format=%t 2>/dev/null | grep -qE '^(idle|mix|alloc)$'; then
            echo "SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    cannot "the node does not come up, see $folder/slurmctld.log and $folder/slurmd.log"
}

stop() {
    local name
    for name in slurmd slurmctld munged; do
        if [ -s "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")" 2>/dev/null || true; fi
    done
}

case ${1:-} in
    start) start ;;
    stop) stop ;;
    *) echo "usage: .ci/slurm.sh start|stop [FOLDER]" >&2; exit 2 ;;
esac
