#!/bin/sh
# Make .venv-airflow: Airflow, its OpenAI provider and ours, which want other versions than .venv
# holds. A second call finds its stamp and returns at once. Ends with 3 where it cannot be built.
#
# The tests that need it:
#   .venv-airflow/bin/python -m pytest --confcutdir=tests/airflow tests/airflow
# (without --confcutdir pytest reads tests/conftest.py, whose libraries are not there). The server
# under test is started from .venv; BATCHCTL_TEST_URL, BATCHCTL_TEST_MODEL and
# BATCHCTL_TEST_API_KEY name another that runs already. Types: cd airflow_provider &&
# ../.venv-airflow/bin/mypy
set -eu

cd "$(dirname "$0")/.."

name=airflow
described="airflow_provider/pyproject.toml scripts/airflow-constraints.txt"
. scripts/environment.sh

# The tests start a server from .venv.
[ -x .venv/bin/batchctl ] || sh scripts/bootstrap.sh run
begin

python=$environment/bin/python
if "$python" -c 'import airflow.sdk' 2>/dev/null && "$python" -m pip --version >/dev/null 2>&1; then
    say "updating $environment"
else
    say "installing into $environment; this happens once, and takes a minute"
    free_mb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1024))
    [ "$free_mb" -ge 700 ] || give_up "$free_mb MB are free here; 700 MB are needed"
    .venv/bin/python -m venv --clear "$environment" ||
        give_up ".venv/bin/python cannot make a virtual environment"
fi

if ! "$python" -m pip install --disable-pip-version-check --no-input -qq --progress-bar off \
    -c scripts/airflow-constraints.txt -e ./airflow_provider apache-airflow \
    apache-airflow-providers-openai openai mypy pytest pytest-timeout >>"$log" 2>&1; then
    why=$(grep '^ *ERROR' "$log" | tail -1 | sed 's/^ *//' | cut -c 1-200)
    give_up "pip could not install it (${why:-no reason given}); its output is in $log"
fi
AIRFLOW_HOME=$(pwd)/build/airflow-probe "$python" -c '
import airflow.providers.openai.operators.openai
import batchctl_provider.operators.batchctl' >>"$log" 2>&1 ||
    give_up "it does not import on this machine; see $log"
printf '%s\n' "$stamp" >"$environment/.stamp"
