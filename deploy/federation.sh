#!/usr/bin/env bash
# A federation on this machine: a coordinator and three labs, each a process with a directory of its
# own, from nothing to the finished model at the labs. The commands are those of docs/deploy.md;
# what is added here is waiting where a person would look, and the checks at the end.
#
#   deploy/federation.sh DIR [DATA]       CYTOFED: the command; PORT: on loopback, default any free one
#
# Exit 0: the run is completed, all labs have the coordinator's model, every egress log verifies.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cytofed=${CYTOFED:-cytofed}
python=$(dirname "$(command -v "$cytofed")")/python
work=${1:?"usage: federation.sh DIR [DATA]"}
if [ -e "$work" ]; then
  echo "federation: $work exists already: remove it or name another" >&2
  exit 2
fi
mkdir -p "$work"
cd "$work"
export XDG_STATE_HOME=$PWD/state # a trial draws on no real budget of this machine's user
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

started=()
stop() {
  for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait
}
trap stop EXIT

background() { # LOG COMMAND...
  local log=$1
  shift
  "$@" >"$log" 2>&1 </dev/null &
  started+=($!)
}

until_true() { # WHAT COMMAND...: tries for five minutes
  local what=$1
  shift
  for _ in $(seq 600); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.5
  done
  echo "federation: FAILED: waited in vain until $what; logs in $PWD:" >&2
  tail -n 20 ./*.log >&2
  exit 1
}

step() { echo "== $*"; }

step "images of three labs"
"$python" "$here/example_labs.py" images ${2:+"$2"}

step "coordinator"
"$cytofed" server init coordinator --name trial --address "127.0.0.1:$port"
background coordinator.log "$cytofed" server start coordinator
until_true "the coordinator answers" "$cytofed" server status coordinator

step "three labs join"
for lab in leeds bonn porto; do
  "$cytofed" server invite coordinator $lab --out $lab.invite
  "$cytofed" client join $lab.invite --dir $lab --data images/$lab --patients column:patient \
    --patients-declared 25 --pool $lab
  background $lab.log "$cytofed" client start $lab
done
for lab in leeds bonn porto; do "$cytofed" client check $lab; done

step "a plan waits for approval"
"$cytofed" server run coordinator "$here/trial.yaml" --json >queued.json
plan=$("$python" -c 'import json; print(json.load(open("queued.json"))["plan_sha256"])')
run=$("$python" -c 'import json; print(json.load(open("queued.json"))["run"])')
for lab in leeds bonn porto; do
  until_true "$lab has the plan" grep -q "$plan" $lab.log
  "$cytofed" client plans $lab
  "$cytofed" client approve $lab "$plan"
done

step "training"
for lab in leeds bonn porto; do
  until_true "$lab has the model" "$cytofed" client model $lab --out $lab.safetensors
done
"$cytofed" server status coordinator

step "what each lab has"
for lab in leeds bonn porto; do
  cmp $lab.safetensors "coordinator/runs/$run/model.safetensors"
  "$cytofed" client budget $lab
  "$cytofed" client dossier $lab --out $lab.html
done

step "what left"
stop
for lab in leeds bonn porto; do "$cytofed" client egress $lab --verify | tail -n 1; done
"$python" - "coordinator/runs/$run/summary.json" <<'END'
import json, sys

summary = json.load(open(sys.argv[1]))
privacy = summary["privacy"]
print(f"federation: {summary['status']}: {summary['rounds']} rounds of three labs, epsilon "
      f"{privacy['epsilon']:.2f} at delta {privacy['delta']:g} per {privacy['unit']}, sums only")
sys.exit(summary["status"] != "completed" or not summary["wire"]["secure_aggregation"])
END
