#!/bin/sh
# What the challenge starts in the container for each call, as `sh predict.sh`: every CASE.npz in /workspace/inputs is
# segmented into /workspace/outputs/CASE.npz. Further keys may follow, such as zoom.overlap=0.25.
exec python -m segvol_pl challenge predict /workspace/inputs /workspace/outputs \
    checkpoint=/workspace/model.safetensors "$@"
