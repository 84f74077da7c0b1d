#!/bin/sh
# A trainer in any language: train for an epoch, average the file, go on from the mean.
#
#     average.sh EPOCHS MODEL.safetensors TRAIN [ARGUMENT]...
#
# `TRAIN ARGUMENT... MODEL.safetensors` trains for one epoch and rewrites the model. The daemon is found by
# $MOSHPITD_SOCKET; $WEIGHT says how much this peer counts (its examples), $PEERS for how many to wait.
set -eu
epochs=$1 model=$2
shift 2

for epoch in $(seq "$epochs"); do
    "$@" "$model"
    status=0
    moshpitd average "$model" -o "$model.mean" --epoch "$epoch" --weight "${WEIGHT:-1}" \
        --min-peers "${PEERS:-2}" --timeout "${TIMEOUT:-60}" || status=$?
    case $status in
        0) mv "$model.mean" "$model" ;;
        5) echo "epoch $epoch: nobody to average with in time, going on alone" >&2 ;;
        *) exit "$status" ;;
    esac
done
