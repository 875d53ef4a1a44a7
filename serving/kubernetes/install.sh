#!/bin/sh
# Install apt-ray with all of its extras, in the tested versions, into a virtual environment of its own:
#
#   serving/kubernetes/install.sh /opt/apt-ray
#
# The step of Containerfile that can fail. PYTHON names the interpreter; pip's variables are honoured.
set -eu

folder=$1
source=$(cd "$(dirname "$0")/../.." && pwd)

"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
    -c "$source/constraints.txt" "$source[all]"
# HAProxy comes with ray[serve]; Ray starts it by this.
install -m 755 "$source/apt_ray/devtools/haproxy" "$folder/bin/apt-ray-haproxy"
