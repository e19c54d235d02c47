#!/usr/bin/env bash
# up.sh DIR: a private SLURM cluster on this machine, with everything of it in DIR: munge, accounting (mariadb and
# slurmdbd), one controller, and NODES node daemons n1, n2, ... that each see a host name of their own. Needs root
# (host names are UTS namespaces, and marked lines of /etc/hosts). Prints the line that points SLURM's commands at it.
# From the environment: NODES (2), CPUS a node (8), GPUS a node (2, invented), GRACE seconds (20), PORT (27817).
set -euo pipefail
dir=$(mkdir -p "$1" && cd "$1" && pwd)
nodes=${NODES:-2} cpus=${CPUS:-8} gpus=${GPUS:-2} grace=${GRACE:-20} port=${PORT:-27817}
user=$(id -un) host=$(hostname -s)
[ "$(id -u)" = 0 ] || { echo "up.sh: needs root" >&2; exit 3; }
mkdir -p "$dir"/{state,log,run,db}
: > "$dir/run/started"

start() { # NAME COMMAND...: in a session of its own; down.sh stops it by the recorded id
  local name=$1
  shift
  setsid "$@" < /dev/null >> "$dir/log/$name.out" 2>&1 &
  echo "$! $name" >> "$dir/run/started"
}
until_ok() {
  for _ in $(seq 400); do
    if "$@" > /dev/null 2>&1; then return 0; fi
    sleep 0.05
  done
  echo "up.sh: gave up waiting for: $*" >&2
  tail -n 20 "$dir"/log/* >&2
  return 1
}

for i in $(seq "$nodes"); do
  echo "127.0.0.1 n$i # scalerun-test $dir" >> /etc/hosts
done
(umask 077 && head -c 1024 /dev/urandom > "$dir/munge.key")
start munged munged --foreground --force --key-file="$dir/munge.key" --socket="$dir/run/munge.sock" \
  --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed"

# config_overrides: a node may claim more CPUs than the machine has. linuxproc: no cgroups needed. cred_expire: a
# requeued job starts again in seconds, not in two minutes. preempt_send_user_signal: preemption sends --signal.
cat > "$dir/slurm.conf" << END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser=$user
SlurmdUser=$user
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
SlurmctldParameters=preempt_send_user_signal
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
KillWait=5
MinJobAge=3600
JobRequeue=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
AccountingStoragePass=$dir/run/munge.sock
AccountingStorageEnforce=limits
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=$grace
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
END
for i in $(seq "$nodes"); do
  echo "NodeName=n$i NodeHostname=n$i NodeAddr=127.0.0.1 Port=$((port + 1 + i)) CPUs=$cpus RealMemory=20000 Gres=gpu:$gpus"
done >> "$dir/slurm.conf"
echo "NodeName=n[1-$nodes] Name=gpu File=/dev/tty[0-$((gpus - 1))]" > "$dir/gres.conf" # any device files do
(umask 077 && cat > "$dir/slurmdbd.conf" << END
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock
DbdHost=localhost
DbdPort=$((port + 1))
SlurmUser=$user
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=$user
StorageLoc=slurm_acct_db
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/slurmdbd.pid
END
)
export SLURM_CONF=$dir/slurm.conf
{ # mysql.proc: without it slurmdbd's procedures do not run, and a user has no account (limits are enforced)
  printf '%s\n' "CREATE DATABASE mysql;" "USE mysql;"
  grep "^CREATE TABLE IF NOT EXISTS proc " /usr/share/mysql/mysql_system_tables.sql
  echo "CREATE DATABASE slurm_acct_db;"
} > "$dir/init.sql"
start mariadbd mariadbd --no-defaults --user="$user" --datadir="$dir/db" --socket="$dir/run/mysqld.sock" \
  --pid-file="$dir/run/mysqld.pid" --skip-networking --skip-grant-tables --init-file="$dir/init.sql" \
  --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-flush-log-at-trx-commit=0 \
  --innodb-lock-wait-timeout=900
until_ok test -S "$dir/run/munge.sock"
until_ok test -S "$dir/run/mysqld.sock"
start slurmdbd env MYSQL_UNIX_PORT="$dir/run/mysqld.sock" slurmdbd -D
until_ok sacctmgr -n show cluster
sacctmgr -i add cluster test > /dev/null
start slurmctld slurmctld -D -f "$SLURM_CONF"
for i in $(seq "$nodes"); do
  mkdir -p "$dir/spool.n$i"
  start "slurmd.n$i" unshare --uts sh -c "hostname n$i && exec slurmd -D -f '$SLURM_CONF' -N n$i"
done
idle() { [ "$(sinfo --noheader --Node --partition=main --states=idle --format=%N | sort -u | wc -l)" = "$nodes" ]; }
until_ok idle
echo "export SLURM_CONF=$SLURM_CONF"
