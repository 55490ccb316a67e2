# segvol_pl as a container of the CVPR 2025 challenge on interactive segmentation: the image of container/Dockerfile, one
# model, and predict.sh, which the challenge starts. From the root of the repository, with the model in its folder:
#
#   docker build -f container/Dockerfile -t segvol-pl .
#   cp runs/seg/model.safetensors container/
#   docker build -f container/challenge.Dockerfile -t team container
#   docker run --gpus all -m 32G --rm -v "$PWD/inputs:/workspace/inputs" -v "$PWD/outputs:/workspace/outputs" team \
#       /bin/bash -c "sh predict.sh"
#
# The user of the image needs to write to the folder of the outputs. Texts that the model's bank lacks need the CLIP that
# made it: add its folder by another COPY, and clip_model=FOLDER to predict.sh.

FROM segvol-pl
WORKDIR /workspace
COPY predict.sh model.safetensors ./
ENTRYPOINT []
CMD ["sh", "predict.sh"]
