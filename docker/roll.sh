#!/bin/sh
# Replaces every replica by one of the image and the settings as they are now, while streams go on: the new ones start beside the old ones, then one old one
# after another is asked to stop, and its streams move. Typed at the root of the repository, after `docker compose ... build indrnn`:
#   docker/roll.sh
set -eu
: "${COMPOSE_FILE:=compose.yaml:docker/compose.scale.yaml}"
export COMPOSE_FILE
old=$(docker compose ps --quiet indrnn)
count=$(echo "$old" | wc -w)
[ "$count" -gt 0 ] || { echo "roll.sh: nothing runs; start it with docker compose up" >&2; exit 1; }
docker compose up --detach --no-recreate --no-deps --wait --scale "indrnn=$((2 * count))" indrnn
sleep 3 # until the balancer has found them
for replica in $old; do
    docker stop "$replica" # within stop_grace_period
    docker rm "$replica"
done
