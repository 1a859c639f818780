#!/bin/sh
# System packages that only tests need. Asks for root only when something is missing.
set -eu
missing=""
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="postgresql"
for tool in curl jq chromium; do
  command -v "$tool" >/dev/null || missing="$missing $tool"
done
if [ -n "$missing" ]; then
  echo "installing for the tests: $missing"
  # shellcheck disable=SC2086 # one word for each package
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null
fi
