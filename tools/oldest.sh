#!/usr/bin/env bash
# The quick tests with the oldest releases of all dependencies that pyproject.toml allows: tools/oldest.sh PYTEST-ARGUMENTS...
#
# They are installed into an environment of their own, .work/oldest. libvirt-python is left out: it must fit the machine's
# libvirt. PYTHON chooses the interpreter (default: see tools/interpreter.sh).
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here"
environment=.work/oldest
mkdir -p .work
. tools/interpreter.sh
"$python" -m venv --clear "$environment"
python=$environment/bin/python
"$python" - >"$environment/oldest.txt" <<'PYTHON'
import pathlib, tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["cli"], *extras["clouds"], *extras["oslo"]]:
    print(requirement.replace(">=", "==", 1))
PYTHON
"$python" -m pip install -q --disable-pip-version-check -r "$environment/oldest.txt" \
    hypothesis 'pytest>=8' pytest-timeout pytest-xdist
"$python" -m pip install -q --disable-pip-version-check --no-deps -e .
"$python" -m pip check
exec "$python" -m pytest -q "$@"
