#!/usr/bin/env bash
# One command to the first token: install into .venv, bring up one prefill and one decode worker on the embedded
# model, ask one streamed question, then serve until interrupted.
#
#   bash deploy/quickstart.sh [--check] [-- ARGS]     ARGS go to `penstock serve`; --check stops after the answer
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
check=false
while [ $# -gt 0 ]; do
    case $1 in
        --check) check=true; shift ;;
        --) shift; break ;;
        *) echo "quickstart.sh: unknown option $1 (options for the server go behind --)" >&2; exit 2 ;;
    esac
done

. "$root/deploy/environment.sh"
penstock_environment "$root"
export PATH="$root/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1
export PENSTOCK_QUICKSTART=$$-$RANDOM  # marks everything that is started below

penstock serve "$@" &
server=$!
stop() {
    trap - INT TERM EXIT
    kill -INT "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

python "$root/deploy/first_question.py" --server-pid "$server" -- "$@"
if $check; then
    stop
    python "$root/deploy/first_question.py" --expect-gone "$server"
    echo "check passed: the cluster answered and is gone again"
else
    echo "serving until interrupted (Ctrl-C)"
    wait "$server"
fi
