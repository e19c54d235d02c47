#!/usr/bin/env bash
# down.sh DIR: end the jobs and the daemons that up.sh DIR started, take back its lines of /etc/hosts, remove DIR.
set -uo pipefail
dir=$(cd "$1" && pwd) || exit 0
export SLURM_CONF=$dir/slurm.conf
timeout 10 scancel --full --user="$(id -un)" 2> /dev/null
for _ in $(seq 50); do
  [ -z "$(timeout 5 squeue --noheader 2> /dev/null)" ] && break
  sleep 0.2
done
timeout 10 scontrol shutdown 2> /dev/null
ours() { # the id still names a daemon that works in DIR or was started for it
  case "$(ps -o stat= -p "$1" 2> /dev/null)" in "" | Z*) return 1 ;; esac
  tr '\0' ' ' < "/proc/$1/cmdline" 2> /dev/null | grep -qE 'munged|mariadbd|slurm'
}
tac "$dir/run/started" | while read -r pid name; do
  for i in $(seq 100); do
    ours "$pid" || break
    case $i:$name in
      1:munged | 1:mariadbd | 1:slurmdbd | 40:*) kill "$pid" 2> /dev/null ;;
      90:*) kill -9 "$pid" 2> /dev/null ;;
    esac
    sleep 0.1
  done
done
rest=$(grep -vF "# scalerun-test $dir" /etc/hosts) # of another cluster, too
printf '%s\n' "$rest" > /etc/hosts                   # in place: it may be a bind mount
rm -rf "$dir"
