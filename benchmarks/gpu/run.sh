#!/usr/bin/env bash
# Everything that a GPU machine can tell about this checkout, in one command and without a network:
# build, tests, benchmark. PYTHON names an interpreter with torch; run.py has the options.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/run.py" "$@"
