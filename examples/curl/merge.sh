#!/usr/bin/env bash
# Merge through the service with nothing but curl and jq:
#   MERGEYARD_URL=… MERGEYARD_TOKEN=… examples/curl/merge.sh recipe.yaml s3://models/merged
# Prints the output's digest; fails with the reason if the job does.
set -euo pipefail
recipe=$1 output=$2

api() {
  curl --silent --show-error --fail-with-body \
    --header "Authorization: Bearer $MERGEYARD_TOKEN" --header "Content-Type: application/json" "$@"
}

# The same recipe and output make no second job, however often this is run within a day.
key=$(printf '%s' "$output" | cat "$recipe" - | sha256sum | cut -c 1-64)
job=$(jq --null-input --rawfile recipe "$recipe" --arg output "$output" \
    '{recipe: $recipe, output_uri: $output, labels: {by: "curl"}}' \
  | api --header "Idempotency-Key: $key" --data @- "$MERGEYARD_URL/v1/jobs" | jq --raw-output .id)
echo "job $job" >&2

api --no-buffer --header "Accept: text/event-stream" "$MERGEYARD_URL/v1/jobs/$job/events" \
  | sed --unbuffered --quiet 's/^data: //p' \
  | jq --unbuffered --raw-output 'select(.type == "job.state_changed") | .data.to' >&2

api "$MERGEYARD_URL/v1/jobs/$job/result" | jq --raw-output .output.digest
